"""The part of fitting that needs no gradient: means by token, regressions, whitening, calibration.

Residuals are badly conditioned: a few outlier directions dominate. So a layer's regressions also give a basis in which
its inputs are white, gradient descent works in that basis, and `unwhiten` folds it into the tables afterwards.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.model.platforms import reproducible
from moe_jax.outputs import room
from moe_jax.prediction.activation_log import ActivationLog, Activations, not_finite
from moe_jax.prediction.interface import Spec
from moe_jax.prediction.learned import ahead_of, centred, normalise, score_windows, window_inputs, window_targets
from moe_jax.prediction.regression_rows import rows_seen, windows_at_once

SEEN = 1.0
"""Occurrences that a token's mean is drawn towards zero by."""


def rows_of(log: ActivationLog, most: int) -> np.ndarray:
    """The row of every token in the tables, int32 [V]: the `most` most frequent ones of the log have their own."""
    windows = log.windows
    counts = np.bincount(windows.tokens[np.arange(windows.tokens.shape[1]) < windows.lengths[:, None]])
    frequent = np.argsort(-counts, kind="stable")[: min(most, np.count_nonzero(counts))]
    row = np.zeros(len(counts), np.int32)
    row[frequent] = 1 + np.arange(len(frequent))
    return row


def token_means(table: np.ndarray, row: np.ndarray, log: ActivationLog, rows: np.ndarray, batch: int) -> np.ndarray:
    """What each token says of its own layers' logits, of the next token's, and of these while it is not known.

    The first two are means of what the other one leaves, in turns.

    Args:
      table: for its shape, that of `tokens` of the network, float32 [rows, 3, L, E].
      row: of every token.
      rows: windows of the log.

    Raises:
      UserError: some logits are not finite.
    """
    table = np.zeros_like(table)
    for kind in (2, 0, 1, 0, 1):
        sums, counts = np.zeros((len(table), *table.shape[2:]), np.float32), np.zeros(len(table))
        for start in range(0, len(rows), batch):
            part = log.read(rows[start : start + batch], only=("logits",))
            tokens = row_in(row, part.tokens)
            inside = np.arange(1, tokens.shape[1]) < part.lengths[:, None]
            this, last = tokens[:, 1:][inside], tokens[:, :-1][inside]
            logits = np.swapaxes(part.logits, 1, 2)[:, 1:][inside].astype(np.float32)
            logits -= logits.mean(-1, keepdims=True)
            if kind < 2:
                logits -= table[this, 0] + table[last, 1]
            of = this if kind == 0 else last
            order = np.argsort(of, kind="stable")
            found, first = np.unique(of[order], return_index=True)
            sums[found] += np.add.reduceat(logits[order], first, axis=0)
            counts += np.bincount(of, minlength=len(table))
        if not (finite := np.isfinite(sums).all((0, 2))).all():
            raise not_finite(int(np.argmin(finite)))
        table[:, kind] += sums / (counts + SEEN)[:, None, None].astype(np.float32)
    return table


def row_in(row: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Rows of tokens; the first one for those that were never seen."""
    return np.where(tokens < len(row), row[np.minimum(tokens, len(row) - 1)], 0)


def least_squares(
    network: dict[str, Any], row: np.ndarray, spec: Spec, log: ActivationLog, rows: np.ndarray, ridge: float, batch: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Where gradient descent starts: every correction of a layer is a regression of what an estimate still lacks.

    Layers are solved one after the other, each on the estimates that those before it left: first what they say of the
    next token's layers, then what they say of their own token's, last the echoes. So memory is that of one system of
    D + E + 1 unknowns and of some windows: more of them are read one part after the other, their sums are added up, and
    their estimates lie in a file beside the log meanwhile.

    Returns:
      The network in whitened coordinates, and the basis: `white` [L, D, D] and `mean` [L, D] of x, for which
      (x - mean) @ white has unit covariance.

    Raises:
      UserError: the log holds something that is not finite, or its disk has no room for the estimates.
    """
    D, E, L, T = spec.d_model, spec.num_experts, spec.num_layers, log.windows.tokens.shape[1]
    table: dict[str, Any] = {name: np.array(value) for name, value in network.items()}
    table["tokens"] = token_means(table["tokens"], row, log, rows, batch)
    rows = rows_seen(rows, log.windows, spec)
    at_once = windows_at_once(T, spec)
    chunks = [slice(start, min(start + at_once, len(rows))) for start in range(0, len(rows), at_once)]
    # Tokens that have both neighbours, so that all targets are known.
    known = (np.arange(T) > 0) & (np.arange(T) + 1 < log.windows.lengths[rows][:, None])
    inside = {chunk.start: known[chunk] for chunk in chunks}
    basis: dict[str, list[np.ndarray]] = {"white": [], "mean": []}
    logits = lambda layer, chunk: np.asarray(centred(log.read(rows[chunk], layer, only=("logits",)).logits))
    token_rows = row_in(row, log.windows.tokens[rows])
    says = lambda kind, layer, chunk: table["tokens"][token_rows[chunk], kind, layer]
    base = lambda layer, chunk: says(0, layer, chunk) + _before(says(1, layer, chunk))
    seen = lambda layer, chunk: tuple(np.asarray(z) for z in _seen(spec, log.read(rows[chunk], layer)))

    @functools.lru_cache(1)
    def inputs(layer, start):
        """What a layer reads in a chunk: for `READ`, for `NEWS` and of itself, [W, T, ...]."""
        if len(basis["white"]) == layer:
            found = _whitening(seen(layer, chunk)[0][inside[chunk.start]] for chunk in chunks)
            for name, value in zip(basis, found, strict=True):
                basis[name].append(value)
        chunk = slice(start, min(start + at_once, len(rows)))
        x, gates, said = seen(layer, chunk)
        x = (x - basis["mean"][layer]) @ basis["white"][layer]
        beside = np.concatenate([gates, np.ones_like(gates[..., :1])], -1)
        return np.concatenate([x, beside], -1), np.concatenate([said - base(layer, chunk), beside], -1), beside

    (read, news), first = ahead_of(L), table["gates"].shape[-1] // E - 1
    places = [(first, L), *enumerate((*read, *news))]
    kind_of = lambda place: 0 if place < len(read) else 1 if place < first else 2  # which of the inputs
    estimate = _estimates((L, len(rows), T, E), log.directory if len(chunks) > 1 else None)
    for chunk in chunks:
        for layer in range(L):
            estimate[layer, chunk] = says(2, layer, chunk)
    for wraps in (True, False):
        for layer in range(L):
            for group in _apart([(p, (layer + h) % L) for p, h in places if (layer + h >= L) == wraps]):
                squares: dict[int, Any] = {kind_of(place): 0 for place in group}
                sums: dict[int, Any] = {}
                for chunk in chunks:
                    of, see = inside[chunk.start], inputs(layer, chunk.start)
                    for kind in squares:
                        squares[kind] = squares[kind] + _square(see[kind][of])
                    for place, target in group.items():
                        old, wanted = estimate[target, chunk], logits(target, chunk)
                        wanted = (_after(wanted) if wraps else wanted)[of]
                        sums[place] = _added(sums.get(place), _sums(see[kind_of(place)][of], wanted, old[of]))
                found = {place: _solve(squares[kind_of(place)], sums[place], ridge) for place in group}
                for chunk in chunks:
                    see = inputs(layer, chunk.start)
                    for place, target in group.items():
                        keep, solved = found[place]
                        estimate[target, chunk] = estimate[target, chunk] * keep + see[kind_of(place)] @ solved
                for place, (keep, solved) in found.items():
                    if place < first:
                        name, at = ("read", place) if place < len(read) else ("mix", place - len(read))
                        table[name][layer, :, at * E : at * E + E] = solved[: -1 - E]
                    table["gates"][layer, :, place * E : place * E + E] = solved[-1 - E : -1]
                    table["bias"][layer, place * E : place * E + E] = solved[-1]
                    if place < first:
                        table["keep"][layer, place] = keep
                    else:  # all that was there before is the guess
                        table["tokens"][:, 2, layer] *= keep
        if wraps:
            left = np.array(estimate[0])  # [W, T, E]
            for layer in range(L):
                both: Any = None
                for chunk in chunks:
                    of, has = inside[chunk.start], _before(estimate[layer, chunk])
                    lacks = logits(layer, chunk) - base(layer, chunk)
                    both = _added(both, ((has * lacks)[of].sum(0), (has * has)[of].sum(0)))
                table["begin_keep"][layer] = keep = both[0] / np.maximum(both[1], 1e-9)
                for chunk in chunks:
                    estimate[layer, chunk] = base(layer, chunk) + keep * _before(estimate[layer, chunk])
    for layer in range(L):
        square: Any = 0
        total: Any = None
        for chunk in chunks:
            of = inside[chunk.start]
            said = inputs(layer, chunk.start)[0][..., :D] @ table["read"][layer, :, :E]
            # The last token of what the last layer says of the next token's layer 0 is this one.
            wanted, old = (
                (logits(layer, chunk), estimate[layer, chunk]) if layer else (_after(logits(0, chunk)), left[chunk])
            )
            lacks, said = (wanted - old)[of], (_before(said) if layer else said)[of]
            square, total = square + _square(said), _added(total, _sums(said, lacks, np.zeros_like(lacks)))
        table["echo"][layer] = _solve(square, total, ridge)[1]
    return {name: jnp.asarray(value) for name, value in table.items()}, {n: np.stack(z) for n, z in basis.items()}


def _estimates(shape: tuple[int, ...], folder: Path | None) -> np.ndarray:
    """Room for float32 numbers: in memory, or in a file of this folder that has no name."""
    if folder is None:
        return np.empty(shape, np.float32)
    with room(folder, resumes=True), tempfile.TemporaryFile(dir=folder) as file:
        size = 4 * int(np.prod(shape))
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now
        return np.memmap(file, np.float32, "r+", shape=shape)


def _apart(places: list[tuple[int, int]]) -> list[dict[int, int]]:
    """The same (place, target layer) in their order, in groups that have no target twice: each is solved at once."""
    groups: list[dict[int, int]] = [{}]
    for place, target in places:
        if target in groups[-1].values():
            groups.append({})
        groups[-1][place] = target
    return groups


def _square(see: np.ndarray) -> np.ndarray:
    return (see.T @ see).astype(np.float64)


def _sums(see: np.ndarray, wanted: np.ndarray, old: np.ndarray) -> tuple[Any, ...]:
    """Of some rows, what `_solve` needs beside `_square`."""
    right = (see.T @ np.concatenate([wanted, old], -1)).astype(np.float64)
    return right, (old * old).sum(0), (old * wanted).sum(0), len(see)


def _added(sums: tuple[Any, ...] | None, more: tuple[Any, ...]) -> tuple[Any, ...]:
    return more if sums is None else tuple(x + y for x, y in zip(sums, more, strict=True))


def _solve(square: np.ndarray, sums: tuple[Any, ...], ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The best `wanted` = `old` * keep + `see` @ solved, keep [E], from `_square` and `_sums` of all rows."""
    right, of_itself, of_both, count = sums
    square = square + np.eye(len(square)) * (ridge * np.trace(square) / len(square) + 1e-9)
    of_wanted, of_old = np.split(np.linalg.solve(square, right), 2, axis=-1)
    right_old = right[:, right.shape[-1] // 2 :]
    apart = of_itself - (of_old * right_old).sum(0)  # what is left of `old` beside `see`
    common = of_both - (of_wanted * right_old).sum(0)
    keep = np.where(apart > 1e-6 * count, common / np.maximum(apart, 1e-9), 0.0)
    return keep.astype(np.float32), (of_wanted - keep * of_old).astype(np.float32)


def _whitening(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The basis of x [rows, D], of which these are the parts."""
    moments = [(len(x), x.mean(0), np.cov(x.T, bias=True)) for x in parts if len(x)]
    total = sum(count for count, _, _ in moments)
    mean: Any = sum(count * of.astype(np.float64) for count, of, _ in moments) / total
    covariance = sum(count / total * (of + np.outer(m - mean, m - mean)) for count, m, of in moments)
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 1e-4 * values.mean() + 1e-12)  # directions that never vary stay as they are
    return ((vectors / np.sqrt(values)) @ vectors.T).astype(np.float32), mean.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _seen(spec: Spec, a: Activations) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised residuals, gates of all experts and centred logits of one layer."""
    gates = jax.nn.one_hot(a.ids.astype(jnp.int32), spec.num_experts) * a.gates.astype(jnp.float32)[..., None]
    return normalise(a.residual, spec.norm_eps), gates.sum(-2), centred(a.logits)


def _before(this: np.ndarray) -> np.ndarray:
    """[W, T, ...] of the token before, zero for a window's first."""
    return np.concatenate([np.zeros_like(this[:, :1]), this[:, :-1]], axis=1)


def _after(this: np.ndarray) -> np.ndarray:
    """[W, T, ...] of the token after, zero for a window's last."""
    return np.concatenate([this[:, 1:], np.zeros_like(this[:, :1])], axis=1)


def unwhiten(network: dict[str, jax.Array], basis: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The same network for inputs as they are: the tables that read x, times the whitening matrix."""
    white, mean = basis["white"], basis["mean"]
    read = white @ network["read"]
    expert_in = jnp.einsum("lcd,ledm->lecm", white, network["expert_in"])
    return network | {
        "read": read,
        "centre": network["centre"] - jnp.einsum("ld,ldr->lr", mean, read),
        "expert_in": expert_in,
        "expert_bias": network["expert_bias"] - jnp.einsum("ld,ledm->lem", mean, expert_in),
    }


@reproducible(static_argnums=0, static_argnames="steps")
def calibrate(
    spec: Spec, network: dict[str, Any], basis: Any, row: jax.Array, a: Activations, steps: int = 60
) -> dict[str, Any]:
    """Scale and shift of every place and horizon, fitted to a few windows: what fits logits leaves them too flat."""
    plain = network | {"scale": jnp.ones_like(network["scale"]), "shift": jnp.zeros_like(network["shift"])}
    _, margins = score_windows(unwhiten(plain, basis), window_inputs(spec.norm_eps, a, row), spec.top_k)
    wanted, known = window_targets(used(a, spec), a.lengths, spec.horizon)
    adam = optax.adam(0.1)

    def objective(affine):
        scores = margins * affine["scale"][:, None, :, None] + affine["shift"][:, None, :, None]
        # A sum over places and horizons: each has its own two numbers.
        return (optax.sigmoid_binary_cross_entropy(scores, wanted).mean(-1) * known).mean(1).sum()

    def step(_, carry):
        updates, optimizer_state = adam.update(jax.grad(objective)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], updates), optimizer_state

    affine = {"scale": network["scale"], "shift": network["shift"]}
    return network | jax.lax.fori_loop(0, steps, step, (affine, adam.init(affine)))[0]


def padded(log: ActivationLog, rows: np.ndarray, batch: int) -> Activations:
    """The first `batch` of `rows`, filled up with windows of length 0: one shape, one executable."""
    part = log.read(rows[:batch])
    missing = batch - len(part.lengths)
    return Activations(*(np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in part))


def used(a: Activations, spec: Spec) -> jax.Array:
    """Multi-hot experts of every token, [W, L, T, E]."""
    return jax.nn.one_hot(a.ids.astype(jnp.int32), spec.num_experts).sum(-2)

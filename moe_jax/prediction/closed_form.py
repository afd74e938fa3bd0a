"""The part of fitting that needs no gradient: means by token, regressions, whitening, calibration.

Residuals are badly conditioned: a few outlier directions dominate. So a layer's regressions also give a basis in which
its inputs are white, gradient descent works in that basis, and `unwhiten` folds it into the tables afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.prediction.activation_log import ActivationLog, Activations
from moe_jax.prediction.interface import Spec
from moe_jax.prediction.learned import ahead_of, centred, normalise, score_windows, window_inputs, window_targets

SEEN = 1.0
"""Occurrences that a token's mean is drawn towards zero by."""
MOST, WINDOWS = 2**25, 512
"""Estimated logits (128 MiB) and windows that the regressions look at, at most."""


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
    next token's layers, then what they say of their own token's, last the echoes. So memory is that of the estimates of
    some windows and of one system of D + E + 1 unknowns.

    Returns:
      The network in whitened coordinates, and the basis: `white` [L, D, D] and `mean` [L, D] of x, for which
      (x - mean) @ white has unit covariance.
    """
    E, L, T = spec.num_experts, spec.num_layers, log.windows.tokens.shape[1]
    table: dict[str, Any] = {name: np.array(value) for name, value in network.items()}
    table["tokens"] = token_means(table["tokens"], row, log, rows, batch)
    rows = rows[:: -(-len(rows) // windows_at_once(T, spec))]
    # Tokens that have both neighbours, so that all targets are known.
    inside = (np.arange(T) > 0) & (np.arange(T) + 1 < log.windows.lengths[rows][:, None])
    basis: dict[str, list[np.ndarray]] = {"white": [], "mean": []}
    logits = lambda layer: np.asarray(centred(log.read(rows, layer, only=("logits",)).logits))

    def inputs(layer):
        """What a layer reads: for `READ`, for `NEWS` and of itself, [W, T, ...]."""
        a = log.read(rows, layer)
        x, gates, said = (np.asarray(z) for z in _seen(spec, a))
        if len(basis["white"]) == layer:
            for name, value in zip(basis, _whitening(x[inside]), strict=True):
                basis[name].append(value)
        x = (x - basis["mean"][layer]) @ basis["white"][layer]
        beside = np.concatenate([gates, np.ones_like(gates[..., :1])], -1)
        return np.concatenate([x, beside], -1), np.concatenate([said - base[:, :, layer], beside], -1), beside

    this, after, guess = np.moveaxis(table["tokens"][row_in(row, log.windows.tokens[rows])], 2, 0)
    base, estimate = this + _before(after), guess
    (read, news), first = ahead_of(L), table["gates"].shape[-1] // E - 1
    places = [(first, L), *enumerate((*read, *news))]
    for wraps in (True, False):
        for layer in range(L):
            of_x, of_news, beside = inputs(layer)
            for place, h in places:
                if (layer + h >= L) != wraps:
                    continue
                target, reads = (layer + h) % L, place < len(read)
                see = of_x if reads else of_news if place < first else beside
                old, wanted = estimate[:, :, target], logits(target)
                keep, solved = _solve(see[inside], (_after(wanted) if wraps else wanted)[inside], old[inside], ridge)
                estimate[:, :, target] = old * keep + see @ solved
                if place < first:
                    name, at = ("read", place) if reads else ("mix", place - len(read))
                    table[name][layer, :, at * E : at * E + E] = solved[: -1 - E]
                table["gates"][layer, :, place * E : place * E + E] = solved[-1 - E : -1]
                table["bias"][layer, place * E : place * E + E] = solved[-1]
                if place < first:
                    table["keep"][layer, place] = keep
                else:  # all that was there before is the guess
                    table["tokens"][:, 2, layer] *= keep
        if wraps:
            left, estimate = estimate, base.copy()
            for layer in range(L):
                lacks, has = logits(layer) - base[:, :, layer], _before(left[:, :, layer])
                keep = (has * lacks)[inside].sum(0) / np.maximum((has * has)[inside].sum(0), 1e-9)
                table["begin_keep"][layer] = keep
                estimate[:, :, layer] += keep * has
    for layer in range(L):
        said = inputs(layer)[0][..., : spec.d_model] @ table["read"][layer, :, :E]
        # The last token of what the last layer says of the next token's layer 0 is this one.
        lacks = logits(layer) - estimate[:, :, layer] if layer else _after(logits(0)) - left[:, :, 0]
        said = _before(said) if layer else said
        table["echo"][layer] = _solve(said[inside], lacks[inside], np.zeros_like(lacks)[inside], ridge)[1]
    return {name: jnp.asarray(value) for name, value in table.items()}, {n: np.stack(z) for n, z in basis.items()}


def windows_at_once(length: int, spec: Spec) -> int:
    """How many windows of so many tokens the regressions look at."""
    return min(WINDOWS, max(1, MOST // (length * spec.num_layers * spec.num_experts)))


def _solve(see: np.ndarray, wanted: np.ndarray, old: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The best `wanted` = `old` * keep + `see` @ solved, keep [E]: all of them [rows, ...]."""
    square = (see.T @ see).astype(np.float64)
    square += np.eye(len(square)) * (ridge * np.trace(square) / len(square) + 1e-9)
    right = (see.T @ np.concatenate([wanted, old], -1)).astype(np.float64)
    of_wanted, of_old = np.split(np.linalg.solve(square, right), 2, axis=-1)
    right_old = right[:, old.shape[-1] :]
    apart = (old * old).sum(0) - (of_old * right_old).sum(0)  # what is left of `old` beside `see`
    common = (old * wanted).sum(0) - (of_wanted * right_old).sum(0)
    keep = np.where(apart > 1e-6 * len(see), common / np.maximum(apart, 1e-9), 0.0)
    return keep.astype(np.float32), (of_wanted - keep * of_old).astype(np.float32)


def _whitening(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The basis of x [rows, D]."""
    mean = x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True).astype(np.float64))
    values = np.maximum(values, 1e-4 * values.mean() + 1e-12)  # directions that never vary stay as they are
    return ((vectors / np.sqrt(values)) @ vectors.T).astype(np.float32), mean


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


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps")
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

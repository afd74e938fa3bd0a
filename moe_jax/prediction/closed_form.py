"""The part of fitting that needs no gradient: regression, whitening, calibration.

Residuals are badly conditioned: a few outlier directions dominate. So the regression also gives a basis in which inputs
are white, gradient descent works in that basis, and `unwhiten` folds it into the tables afterwards.
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
from moe_jax.prediction.learned import before, corrected, normalise, score_windows, window_inputs, window_targets

MOST = 256  # windows that are looked at: more hardly change where gradient descent starts
START = 0.5
"""Share of a regression that a further target's correction starts from: half of it is known by then."""


def least_squares(
    network: dict[str, jax.Array], spec: Spec, log: ActivationLog, rows: np.ndarray, ridge: float, batch: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Where gradient descent starts: linear regressions on router logits, cut to the directions that a place reads.

    A layer's reads its residual and gates for every target that it corrects and for itself at the next token; that of
    the next layer also reads the residual that the last token left there, which gives that layer's echo. Layers are
    solved one by one, so that memory is that of one system of 2 D + E + 1 unknowns, whatever their number.

    Returns:
      The network in whitened coordinates, and the basis: `white` [P, D, D] and `mean` [P, D] of x, for which
      (x - mean) @ white has unit covariance.
    """
    rows = rows[:: -(-len(rows) // MOST)]
    D, E, L, ahead = spec.d_model, spec.num_experts, spec.num_layers, corrected(spec.num_layers)
    table = {name: np.array(value) for name, value in network.items()}
    basis = {"white": np.zeros((L + 1, D, D), np.float32), "mean": np.zeros((L + 1, D), np.float32)}
    share = np.repeat([1.0, *[START] * (len(ahead) - 1), 1.0], E)
    of_residual = np.zeros((L, D, (len(ahead) + 2) * E), np.float32)  # what it makes a layer say, its echo last
    for layer in range(-1, L):
        square, right = 0.0, 0.0
        for start in range(0, len(rows), batch):
            part = _moments(spec, layer < 0, max(layer, 0), padded(log, rows[start:], batch))
            square, right = square + np.asarray(part[0], np.float64), right + np.asarray(part[1], np.float64)
        assert isinstance(square, np.ndarray) and isinstance(right, np.ndarray)
        white, mean = _whitening(square[:D, :D], square[:D, D], square[D, D])
        basis["white"][layer + 1], basis["mean"][layer + 1] = white, mean
        own = D + 1 if layer < 0 else D + 1 + E
        solved = _solve(square[:own, :own], right[:own], ridge)
        if layer < 0:
            read, say = _factors(np.linalg.solve(white, solved[:D]), table["begin_read"].shape[-1])
            table["begin_read"][:], table["begin_say"][:] = read, say
            table["begin_bias"][:] = solved[D] + mean @ solved[:D]
            continue
        near = _solve(square, right[:, :E], ridge)
        solved[:, :E], of_last = near[:own], near[own:]
        solved *= share
        # As much of the mean echo as belongs to the bias: the echo itself is zero for the mean.
        solved[D, :E] += square[D, own:] / square[D, D] @ of_last
        table["bias"][layer, : len(share)] = solved[D] + mean @ solved[:D]
        table["gates"][layer, :, : len(share)] = solved[D + 1 :]
        of_residual[layer, :, : len(share)], of_residual[(layer + 1) % L, :, len(share) :] = solved[:D], of_last
    # How much it counts what directions are lost to: the near ones are to be told almost exactly.
    weight = np.repeat([max(1 / h, 0.3) for h in ahead] + [0.5, 0.8], E) / [*share, *np.ones(E)]
    for layer in range(L):
        wanted = np.linalg.solve(basis["white"][layer + 1].astype(np.float64), of_residual[layer]) * weight
        table["read"][layer], say = _factors(wanted, table["read"].shape[-1])
        table["say"][layer] = say / weight
    return {name: jnp.asarray(value) for name, value in table.items()}, basis


def _solve(square: np.ndarray, right: np.ndarray, ridge: float) -> np.ndarray:
    return np.linalg.solve(square + np.eye(len(square)) * (ridge * np.trace(square) / len(square) + 1e-9), right)


def _factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best product of two matrices of this rank, the first with orthogonal columns of length 1."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    missing = max(rank - len(values), 0)  # zeros fill up a lower one
    left, right = left[:, :rank], (values[:, None] * right)[:rank]
    return np.pad(left, ((0, 0), (0, missing))), np.pad(right, ((0, missing), (0, 0)))


def _whitening(products: np.ndarray, sums: np.ndarray, count: float) -> tuple[np.ndarray, np.ndarray]:
    """The basis out of a place's sums over tokens."""
    mean = sums / max(count, 1.0)
    values, vectors = np.linalg.eigh(products / max(count, 1.0) - np.outer(mean, mean))
    values = np.maximum(values, 1e-4 * values.mean() + 1e-12)  # directions that never vary stay as they are
    return (vectors / np.sqrt(values)) @ vectors.T, mean


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(spec: Spec, begins: bool, layer: Any, a: Activations) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens: of products of what a layer (or the embedding) reads, in the order x, 1, gates, what the last
    token left in the next layer; and of those with the logits that are wanted of it."""
    L, E = spec.num_layers, spec.num_experts
    x = normalise(a.embedding if begins else a.residual[:, layer], spec.norm_eps)
    logits = jnp.swapaxes(a.logits, 0, 1).astype(jnp.float32)
    logits = logits - logits.mean(-1, keepdims=True)  # [L, W, T, E]
    after = lambda z: jnp.pad(z, ((0, 0), (0, 1), (0, 0)))[:, 1:]
    reads, wanted = [x, jnp.ones_like(x[..., :1])], [*logits]
    if not begins:
        target = lambda h: jnp.where(layer + h < L, logits[(layer + h) % L], after(logits[(layer + h) % L]))
        wanted = [target(h) for h in (*corrected(L), L)]
        gates = jax.nn.one_hot(a.ids[:, layer].astype(jnp.int32), E) * a.gates[:, layer].astype(jnp.float32)[..., None]
        last = normalise(a.residual[:, (layer + 1) % L], spec.norm_eps)
        reads += [gates.sum(-2), jnp.where(layer + 1 < L, before(last), last)]
    # Tokens that have both neighbours, so that a row counts for all targets or for none.
    token = jnp.arange(x.shape[1])
    inside = ((token > 0) & (token + 1 < a.lengths[:, None])).astype(jnp.float32)[..., None]
    rows = lambda parts: (jnp.concatenate(parts, axis=-1) * inside).reshape(inside.size, -1)
    left, right = rows(reads), rows(wanted)
    return left.T @ left, left.T @ right


def unwhiten(network: dict[str, jax.Array], basis: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The same network for inputs as they are: the tables that read x, times the whitening matrix."""
    (white, *whites), (mean, *means) = basis["white"], basis["mean"]
    read = jnp.stack(whites) @ network["read"]
    moved = jnp.einsum("ld,ldr,lro->lo", jnp.stack(means), read, network["say"])
    begin = white @ network["begin_read"]
    return network | {
        "read": read,
        "expert_in": (expert_in := jnp.einsum("lcd,ledm->lecm", jnp.stack(whites), network["expert_in"])),
        "expert_bias": network["expert_bias"] - jnp.einsum("ld,ledm->lem", jnp.stack(means), expert_in),
        "bias": network["bias"] - moved,
        "begin_read": begin,
        "begin_bias": network["begin_bias"] - mean @ begin @ network["begin_say"],
    }


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps")
def calibrate(spec: Spec, network: dict[str, Any], basis: Any, a: Activations, steps: int = 60) -> dict[str, Any]:
    """Scale and shift of every place and horizon, fitted to a few windows: what fits logits leaves them too flat."""
    plain = network | {"scale": jnp.ones_like(network["scale"]), "shift": jnp.zeros_like(network["shift"])}
    _, margins = score_windows(unwhiten(plain, basis), *window_inputs(spec.norm_eps, a), spec.top_k)
    wanted, known = window_targets(used(a, spec), a.lengths, spec.horizon)
    adam = optax.adam(0.1)

    def objective(affine):
        scores = margins * affine["scale"][:, None, None, :, None] + affine["shift"][:, None, None, :, None]
        # A sum over places and horizons: each has its own two numbers.
        losses = optax.sigmoid_binary_cross_entropy(scores, wanted).mean(-1) * known
        return (losses.sum((1, 2)) / jnp.maximum(known.sum((1, 2)), 1)).sum()

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

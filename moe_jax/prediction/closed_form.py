"""The part of fitting that needs no gradient: regression, whitening, calibration.

Residuals are badly conditioned: a few outlier directions dominate. So the regression also gives a basis in which inputs
are white, gradient descent works in that basis, and `unwhiten` folds it into the tables afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.prediction.activation_log import ActivationLog, Activations
from moe_jax.prediction.interface import Spec
from moe_jax.prediction.learned import NEAR, Learned, before, window_inputs, window_targets

MOST = 1024  # windows that are looked at: more do not change the solution


def least_squares(
    network: dict[str, jax.Array], spec: Spec, log: ActivationLog, rows: np.ndarray, ridge: float, batch: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The direct part solved for: linear regression on the target layers' centred router logits.

    Every place and horizon is a system of its own, of 2 D + 2 E + 1 unknowns per expert: the residual, the gates, and
    the residual and the experts that the last token had in the target layer. What it says of the residuals is then cut
    to the network's rank, so that as little as possible is lost of the predicted logits.

    Returns:
      The network in whitened coordinates, and the basis: `white` [P, D, D] and `mean` [P, D] of x, for which
      (x - mean) @ white has unit covariance.
    """
    D, E, H, P = spec.d_model, spec.num_experts, spec.horizon, spec.num_layers + 1
    m = _all_moments(spec, log, rows[:: -(-len(rows) // MOST)], batch)
    basis, colour = _whitening(m.own[:, :D, :D], m.own[:, :D, -1], m.own[:, -1, -1])
    solved = {name: np.array(network[name]) for name in ("near", "far_in", "far_out", "gates", "previous", "bias")}
    solved |= {name: np.array(network[name]) for name in ("echo_in", "echo_out")}
    residual, echo = np.zeros((P, D, H, E)), np.zeros((P, H, D, E))
    for place, h in np.ndindex(P, H):
        target = place + h
        square = np.block(
            [[m.own[place], m.cross[h, place]], [m.cross[h, place].T, m.last[target]]],
        )
        right = np.concatenate([m.own_right[h, place], m.last_right[target]])
        square += np.eye(len(square)) * max(ridge * np.trace(square) / len(square), 1e-6)
        of_x, of_gates, bias, of_last, of_used = np.split(np.linalg.solve(square, right), np.cumsum([D, E, 1, D]))
        own, layer = slice(h * E, (h + 1) * E), target % spec.num_layers + 1
        solved["gates"][place][:, own], solved["previous"][place, h] = of_gates, of_used
        # As much of the mean echo as belongs to the bias: the echo itself is zero for the mean.
        solved["bias"][place, own] = bias[0] + basis["mean"][place] @ of_x + basis["mean"][layer] @ of_last
        residual[place, :, h], echo[place, h] = colour[place] @ of_x, colour[layer] @ of_last
    solved["near"][:] = residual[:, :, :NEAR].reshape(P, D, -1)
    residual[:, :, :NEAR] = 0
    rank = solved["far_in"].shape[-1]
    for place in range(P):
        solved["far_in"][place], solved["far_out"][place] = _factors(residual[place].reshape(D, -1), rank)
    for layer in range(spec.num_layers):
        readers = [(place, h) for place, h in np.ndindex(P, H) if (place + h) % spec.num_layers == layer]
        left, right = _factors(np.concatenate([echo[reader] for reader in readers], axis=1), rank)
        solved["echo_in"][layer + 1] = left
        for number, (place, h) in enumerate(readers):
            solved["echo_out"][place, h] = right[:, number * E : (number + 1) * E]
    return network | {name: jnp.asarray(value, jnp.float32) for name, value in solved.items()}, basis


def _factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best product of two matrices of this rank, of columns and rows of like size; zeros fill up a lower one."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root, missing = np.sqrt(values[:rank]), max(rank - len(values), 0)
    return np.pad(left[:, :rank] * root, ((0, 0), (0, missing))), np.pad(
        root[:, None] * right[:rank], ((0, missing), (0, 0))
    )


def _whitening(
    products: np.ndarray, sums: np.ndarray, counts: np.ndarray
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The basis out of every place's sums over tokens, and the inverse of `white`."""
    whites, colours, means = [], [], []
    for square, total, count in zip(products, sums, np.maximum(counts, 1.0), strict=True):
        mean = total / count
        values, vectors = np.linalg.eigh(square / count - np.outer(mean, mean))
        values = np.maximum(values, 1e-4 * values.mean() + 1e-12)  # directions that never vary stay as they are
        whites.append((vectors / np.sqrt(values)) @ vectors.T)
        colours.append((vectors * np.sqrt(values)) @ vectors.T)
        means.append(mean)
    return {"white": np.stack(whites).astype(np.float32), "mean": np.stack(means).astype(np.float32)}, colours


class Moments(NamedTuple):
    """Sums over tokens of products of what is read: `own` is x, gates and 1 at a place, `last` x and the used experts
    of the last token in a target layer. Q = L + H targets: layers of this token, then of the next one."""

    own: Any  # [P, D + E + 1, D + E + 1]
    cross: Any  # [H, P, D + E + 1, D + E]
    last: Any  # [Q, D + E, D + E]
    own_right: Any  # [H, P, D + E + 1, E]: with the wanted logits
    last_right: Any  # [Q, D + E, E]


def _all_moments(spec: Spec, log: ActivationLog, rows: np.ndarray, batch: int) -> Moments:
    total: Any = None
    for start in range(0, len(rows), batch):
        part = [np.asarray(x, np.float64) for x in _moments(spec, padded(log, rows[start:], batch))]
        total = part if total is None else [x + y for x, y in zip(total, part, strict=True)]
    return Moments(*total)


@functools.partial(jax.jit, static_argnums=0)
def _moments(spec: Spec, a: Activations) -> Moments:
    H, P = spec.horizon, spec.num_layers + 1
    x, gates, _ = window_inputs(spec.norm_eps, a, 1)
    logits = jnp.swapaxes(a.logits, 0, 1).astype(jnp.float32)
    wanted = logits - logits.mean(-1, keepdims=True)
    after = lambda z: jnp.pad(z, ((0, 0), (0, 0), (0, 1), (0, 0)))[:, :, 1:]
    # Tokens that have both neighbours, so that a row counts for all places and horizons or for none.
    token = jnp.arange(x.shape[2])
    inside = ((token > 0) & (token + 1 < a.lengths[:, None])).astype(jnp.float32)[..., None]
    rows = lambda z: (z * inside).reshape(len(z), -1, z.shape[-1])
    left = jnp.concatenate([x[1:], jnp.swapaxes(used(a, spec), 0, 1)], axis=-1)
    Q = spec.num_layers + H
    own = rows(jnp.concatenate([x, gates, jnp.ones_like(x[..., :1])], axis=-1))
    last, right = rows(jnp.concatenate([before(left), left])[:Q]), rows(jnp.concatenate([wanted, after(wanted)])[:Q])
    product = lambda y, z: jnp.einsum("qri,qrj->qij", y, z)
    ahead = range(H)
    return Moments(
        product(own, own),
        jnp.stack([product(own, last[h : h + P]) for h in ahead]),
        product(last, last),
        jnp.stack([product(own, right[h : h + P]) for h in ahead]),
        product(last, right),
    )


def unwhiten(network: dict[str, jax.Array], basis: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The same network for inputs as they are: the tables that read x, times the whitening matrix."""
    white, mean = basis["white"], basis["mean"][:, None]
    turned = {name: white @ network[name] for name in ("near", "far_in", "echo_in", "hidden_in")}
    expert_in = jnp.einsum("pdf,pefm->pedm", white, network["expert_in"])
    bias = network["bias"] - (mean @ turned["far_in"] @ network["far_out"])[:, 0]
    near = (mean @ turned["near"])[:, 0]
    return (
        network
        | turned
        | {
            "expert_in": expert_in,
            "bias": bias.at[:, : near.shape[-1]].add(-near),
            # Zero for the mean, so that an echo that is unknown says nothing.
            "echo_bias": network["echo_bias"] - (mean @ turned["echo_in"])[:, 0],
            "hidden_bias": network["hidden_bias"] - (mean @ turned["hidden_in"])[:, 0],
            "expert_bias": network["expert_bias"] - jnp.einsum("pd,pedm->pem", mean[:, 0], expert_in),
        }
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps")
def calibrate(spec: Spec, network: dict[str, Any], basis: Any, a: Activations, steps: int = 60) -> dict[str, Any]:
    """Scale and shift of every layer and horizon, fitted to a few windows: what fits logits leaves them too flat."""
    plain = network | {"scale": jnp.ones_like(network["scale"]), "shift": jnp.zeros_like(network["shift"])}
    inputs = window_inputs(spec.norm_eps, a, spec.horizon)
    _, margins = Learned().score_windows(unwhiten(plain, basis), inputs, spec.top_k)
    wanted, known = window_targets(used(a, spec), a.lengths, spec.horizon)
    adam = optax.adam(0.1)

    def objective(affine):
        scores = margins * affine["scale"][:, None] + affine["shift"][:, None]
        # A sum over layers and horizons: each has its own two numbers.
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

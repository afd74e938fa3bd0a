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
from moe_jax.prediction.learned import Learned, window_inputs, window_targets


def least_squares(
    network: dict[str, jax.Array], spec: Spec, log: ActivationLog, rows: np.ndarray, ridge: float, batch: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The direct part solved for: linear regression on the target layers' centred router logits.

    Every place and horizon is a system of its own, of D + 2 E + 1 unknowns per expert.

    Returns:
      The network in whitened coordinates, and the basis: `white` [P, D, D] and `mean` [P, D] of x, for which
      (x - mean) @ white has unit covariance.
    """
    D, E, H = spec.d_model, spec.num_experts, spec.horizon

    products: Any = 0.0
    right: Any = 0.0
    for start in range(0, len(rows), batch):
        part = _moments(spec, padded(log, rows[start:], batch))
        products, right = products + np.asarray(part[0], np.float64), right + np.asarray(part[1], np.float64)
    solved = {name: np.array(network[name]) for name in ("residual", "gates", "previous", "bias")}
    for place in range(spec.num_layers + 1):
        for h in range(H):
            own = slice(h * E, (h + 1) * E)
            used = np.r_[: D + E, D + E + h * E : D + E + (h + 1) * E, D + E + H * E]
            square = products[place][np.ix_(used, used)]
            square += np.eye(len(used)) * max(ridge * np.trace(square) / len(used), 1e-6)
            solution = np.linalg.solve(square, right[place][used, own])
            solved["residual"][place][:, own] = solution[:D]
            solved["gates"][place][:, own] = solution[D : D + E]
            solved["previous"][place][h] = solution[D + E : D + 2 * E]
            solved["bias"][place][own] = solution[-1]
    whites, means = [], []
    for place in range(spec.num_layers + 1):
        count = max(products[place][-1, -1], 1.0)
        mean = products[place][:D, -1] / count
        values, vectors = np.linalg.eigh(products[place][:D, :D] / count - np.outer(mean, mean))
        values = np.maximum(values, 1e-4 * values.mean() + 1e-12)  # directions that never vary stay as they are
        whites.append((vectors / np.sqrt(values)) @ vectors.T)
        means.append(mean)
        residual = solved["residual"][place]
        solved["bias"][place] += mean @ residual
        solved["residual"][place] = (vectors * np.sqrt(values)) @ vectors.T @ residual
    basis = {"white": np.stack(whites).astype(np.float32), "mean": np.stack(means).astype(np.float32)}
    return network | {name: jnp.asarray(value, jnp.float32) for name, value in solved.items()}, basis


@functools.partial(jax.jit, static_argnums=0)
def _moments(spec: Spec, a: Activations) -> tuple[jax.Array, jax.Array]:
    """Products of inputs [P, F, F] and of inputs with wanted logits [P, F, H E], summed over tokens."""
    rows = lambda z: z.reshape(len(z), -1, *z.shape[3:])
    x, gates, previous = map(rows, window_inputs(spec.norm_eps, a, spec.horizon))
    inputs = jnp.concatenate([x, gates, previous.reshape(*x.shape[:2], -1), jnp.ones_like(x[..., :1])], axis=-1)
    logits = a.logits.astype(jnp.float32)
    wanted, known = window_targets(logits - logits.mean(-1, keepdims=True), a.lengths, spec.horizon)
    inputs = inputs * known.all(-1, keepdims=True)  # a row counts for all horizons or for none: one matrix
    products = jnp.einsum("lri,lrj->lij", inputs, inputs)
    return products, jnp.einsum("lri,lro->lio", inputs, wanted.reshape(*x.shape[:2], -1))


def unwhiten(network: dict[str, jax.Array], basis: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The same network for inputs as they are: the tables that read x, times the whitening matrix."""
    D, mean = basis["mean"].shape[1], basis["mean"][:, None]
    residual, echo = basis["white"] @ network["residual"], basis["white"] @ network["echo"]
    hidden_in = jnp.concatenate([basis["white"] @ network["hidden_in"][:, :D], network["hidden_in"][:, D:]], axis=1)
    return network | {
        "residual": residual,
        "echo": echo,
        # Zero for the mean, so that an echo that is unknown says nothing.
        "echo_bias": network["echo_bias"] - (mean @ echo)[:, 0],
        "hidden_in": hidden_in,
        "bias": network["bias"] - (mean @ residual)[:, 0],
        "hidden_bias": network["hidden_bias"] - (mean @ hidden_in[:, :D])[:, 0],
    }


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps")
def calibrate(spec: Spec, network: dict[str, Any], basis: Any, a: Activations, steps: int = 60) -> dict[str, Any]:
    """Scale and shift of every layer and horizon, fitted to a few windows: regression leaves logits far too flat."""
    plain = network | {"scale": jnp.ones_like(network["scale"]), "shift": jnp.zeros_like(network["shift"])}
    inputs = window_inputs(spec.norm_eps, a, spec.horizon)
    margins = Learned().score_windows(unwhiten(plain, basis), inputs, spec.top_k)
    wanted, known = window_targets(used(a, spec), a.lengths, spec.horizon)
    adam = optax.adam(0.1)

    def objective(affine):
        scores = margins * affine["scale"][:, None] + affine["shift"][:, None]
        # A sum over layers and horizons: each has its own two numbers.
        return (optax.sigmoid_binary_cross_entropy(scores, wanted).mean(-1) * known).mean(1).sum()

    def step(_, carry):
        updates, optimizer_state = adam.update(jax.grad(objective)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], updates), optimizer_state

    affine = {"scale": plain["scale"], "shift": plain["shift"]}
    return network | jax.lax.fori_loop(0, steps, step, (affine, adam.init(affine)))[0]


def padded(log: ActivationLog, rows: np.ndarray, batch: int) -> Activations:
    """The first `batch` of `rows`, filled up with windows of length 0: one shape, one executable."""
    part = log.read(rows[:batch])
    missing = batch - len(part.lengths)
    return Activations(*(np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in part))


def used(a: Activations, spec: Spec) -> jax.Array:
    """Multi-hot experts of every token, [W, L, T, E]."""
    return jax.nn.one_hot(a.ids.astype(jnp.int32), spec.num_experts).sum(-2)

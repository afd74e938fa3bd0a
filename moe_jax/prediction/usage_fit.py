"""Fits `Usage` to logged routing: at every token of a log, how often experts were used, and are going to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.model.platforms import reproducible
from moe_jax.offload.history import FADING, SCALES, pace, plain
from moe_jax.prediction.activation_log import ActivationLog
from moe_jax.prediction.interface import Array, Spec
from moe_jax.prediction.usage import Usage

HIDDEN = 64
STEPS, WINDOWS, RATE = 1000, 8, 3e-3
"""Gradient steps, windows of the log in each, and the peak learning rate (Adam, one cosine)."""
LEAST_AHEAD = 4
"""Tokens that must follow the next one in the window for a place to count."""


def fit(
    spec: Spec, log: ActivationLog, seed: int, progress: Callable[[int, dict[str, float]], None] = lambda *_: None
) -> Usage:
    """Fits the network to a complete log. The same log and seed give the same one.

    `progress` is told how many steps are done, and the loss: cross-entropy, nats per expert.
    """
    rng, seen = np.random.default_rng(seed), log.outputs().counts
    rate = np.clip(spec.top_k * seen / np.maximum(seen.sum(1, keepdims=True), 1), 1e-3, 1 - 1e-3).reshape(-1)
    inputs = len(SCALES) * len(rate)
    usage = Usage(
        jnp.asarray(np.log(rate / (1 - rate)), jnp.float32),
        jnp.zeros((len(SCALES), len(rate))),
        jnp.asarray(rng.normal(size=(inputs, HIDDEN)) / np.sqrt(inputs), jnp.float32),
        jnp.zeros(HIDDEN),
        jnp.zeros((HIDDEN, len(rate))),
    )
    state = _optimizer().init(usage)
    for step in range(STEPS):
        a = log.read(rng.integers(0, len(log.windows.tokens), WINDOWS), only=("ids",))
        usage, state, value = _update(spec.num_experts, usage, state, a.ids, a.lengths)
        progress(step + 1, {"loss": float(value)})
    return Usage(*map(np.asarray, usage))


def loss(usage: Usage | None, spec: Spec, log: ActivationLog) -> float | None:
    """Cross-entropy on a log, nats per expert; None where its windows are too short for any place to count.

    `usage`: None for what `History` says without a network.
    """
    total = np.zeros(2)
    for start in range(0, len(log.windows.tokens), WINDOWS):
        rows = np.arange(start, min(start + WINDOWS, len(log.windows.tokens)))
        a = log.read(np.resize(rows, WINDOWS), only=("ids",))
        lengths = np.where(np.arange(WINDOWS) < len(rows), a.lengths, 0)  # what was repeated does not count
        total += np.asarray(_sums(spec.num_experts, usage, a.ids, lengths), np.float64)
    return float(total[0] / total[1]) if total[1] else None


def _examples(num_experts: int, ids: Array, lengths: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Averages [T, W, S, N] after every token of windows ids [W, L, T, K], what is to be said of them [T, W, N], and
    whether that is known, float32 [T, W, 1]."""
    W, L, T, K = ids.shape
    place = jnp.arange(T)
    known = place < lengths[:, None]  # [W, T]
    used = jax.nn.one_hot(ids.astype(jnp.int32), num_experts).sum(3) * known[:, None, :, None]
    used = used.transpose(2, 0, 1, 3).reshape(T, W, L * num_experts)

    def remember(averages, now):
        used, share = now
        averages += share[:, None] * (used[:, None] - averages)
        return averages, averages

    def foresee(following, now):
        used, known = now
        total, weight = known * (FADING * following[0] + used), known * (FADING * following[1] + 1)
        return (total, weight), total / jnp.maximum(weight, 1)

    begin = jnp.full((W, len(SCALES), L * num_experts), K / num_experts)
    averages = jax.lax.scan(remember, begin, (used, jnp.asarray(pace(np.arange(T)), jnp.float32)))[1]
    nothing = jnp.zeros_like(used[0])
    following = jax.lax.scan(foresee, (nothing, nothing[:, :1]), (used, known.T[..., None]), reverse=True)[1]
    wanted = jnp.concatenate([following[2:], jnp.zeros_like(following[:2])])
    counts = place[:, None] + 2 + LEAST_AHEAD <= lengths
    return averages, wanted, counts[..., None].astype(jnp.float32)


def _sums_fn(num_experts: int, usage: Usage | None, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Cross-entropy summed over all experts of all places that count, and their number, float32 [2]."""
    averages, wanted, counts = _examples(num_experts, ids, lengths)
    if usage is None:
        p = jnp.clip(plain(averages.reshape(*averages.shape[:3], -1, num_experts)), 1e-6, 1 - 1e-6)
        logits = (jnp.log(p) - jnp.log1p(-p)).reshape(wanted.shape)
    else:
        logits = usage.logits(averages.reshape(-1, averages.shape[2] * averages.shape[3]), jnp).reshape(wanted.shape)
    value = optax.sigmoid_binary_cross_entropy(logits, wanted) * counts
    return jnp.stack([value.sum(), counts.sum() * wanted.shape[-1]])


_sums = reproducible(static_argnums=0)(_sums_fn)


@reproducible(static_argnums=0)
def _update(num_experts: int, usage: Usage, state: Any, ids: jax.Array, lengths: jax.Array) -> Any:
    """One gradient step: network, optimizer's state, and the loss before it."""

    def objective(usage):
        total, count = _sums_fn(num_experts, usage, ids, lengths)
        return total / jnp.maximum(count, 1)

    value, gradient = jax.value_and_grad(objective)(usage)
    updates, state = _optimizer().update(gradient, state)
    return optax.apply_updates(usage, updates), state, value


def _optimizer() -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

"""From router logits to the probability of being among the top K, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.model.architecture import Routing
from moe_jax.model.router import rank
from moe_jax.prediction.interface import Prediction


def from_probability(probability: jax.Array) -> Prediction:
    """A prediction without logits of its own: their logarithm ranks alike."""
    return Prediction(probability, jnp.log(jnp.maximum(probability, 1e-6)))


def standardised(logits: jax.Array, routing: Routing, correction: jax.Array | None = None) -> jax.Array:
    """`evidence` over the standard deviation of the logits of a row: alike for routers of large and of small logits."""
    return evidence(logits, routing, correction) / (logits.std(-1, keepdims=True) + 1e-6)


def evidence(logits: jax.Array, routing: Routing, correction: jax.Array | None = None) -> jax.Array:
    """Values [..., E] that rank as the model ranks, with differences about as large as those of logits."""
    flat = logits.reshape(-1, logits.shape[-1])
    bias = None if correction is None else jnp.broadcast_to(correction, logits.shape).reshape(flat.shape)
    _, ranked = rank(flat, routing, bias)
    values = flat
    if correction is not None:
        slope = 0.25 if routing.scoring == "sigmoid" else 1 / logits.shape[-1]  # of a score in its logit, about
        values = ranked / slope
    # An expert outside the kept groups is not chosen, however high it scores.
    lowest = jnp.where(jnp.isneginf(ranked), jnp.inf, values).min(-1, keepdims=True)
    return jnp.where(jnp.isneginf(ranked), lowest - 20, values).reshape(logits.shape)


def membership(logits: jax.Array, top_k: int) -> jax.Array:
    """Logits [..., E] to probabilities of being among the top K: a sigmoid, moved so that they sum to K."""
    low, high = logits.min(-1, keepdims=True) - 10, logits.max(-1, keepdims=True) + 10

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        above = jax.nn.sigmoid(logits - middle).sum(-1, keepdims=True) > top_k
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, 16, halve, (low, high))
    return jax.nn.sigmoid(logits - (low + high) / 2)

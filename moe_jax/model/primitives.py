"""The smallest pieces that dense layers and experts are made of.

Weights keep the checkpoint's `[out, in]` layout: loading transposes nothing, and a matrix-vector product reads rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.architecture import Activation, ClampedSwiGLU
from moe_jax.model.products import product


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`x [..., in]` times `weight [out, in]` transposed, plus `bias [out]`, in x's dtype: `[..., out]`.

    The weight may be of a narrower dtype than x; every value of it counts in full.
    """
    y = product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def gated(gate_up: jax.Array, activation: Activation) -> jax.Array:
    """Projections [..., 2F] to the hidden activation [..., F]."""
    if isinstance(activation, ClampedSwiGLU):
        gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if activation.interleaved else jnp.split(gate_up, 2, axis=-1)
        gate, up = jnp.minimum(gate, activation.limit), jnp.clip(up, -activation.limit, activation.limit)
        return (up + 1) * (gate * jax.nn.sigmoid(activation.alpha * gate))
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


class RMSNorm(nnx.Module):
    """Root mean square normalisation in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float, dtype):
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * normed.astype(x.dtype)


class FeedForward(nnx.Module):
    """A dense SwiGLU feed-forward: a dense layer's, or the shared expert, whose output a learned gate may scale."""

    def __init__(self, d_model: int, ff: int, activation: Activation, gate: bool, dtype, *, rngs: nnx.Rngs, std: float):
        init = nnx.initializers.normal(std)
        self.gate_up = nnx.Param(init(rngs.params(), (2 * ff, d_model), dtype))
        self.down = nnx.Param(init(rngs.params(), (d_model, ff), dtype))
        self.gate = nnx.Param(init(rngs.params(), (1, d_model), dtype)) if gate else None
        self.activation = activation

    def __call__(self, h: jax.Array) -> jax.Array:
        """Normalised residual h [R, D] to [R, D]."""
        y = linear(gated(linear(h, self.gate_up[...]), self.activation), self.down[...])
        return y if self.gate is None else jax.nn.sigmoid(linear(h, self.gate[...])) * y

"""Decoder stages: pure jitted functions over plain pytrees. They know nothing of where experts live.

One decode step is `embed`, then per layer `route`, `experts` (one or more calls) and `combine`, then `head`. Each is
jitted once; the layer's weights are arguments, so all layers of a kind share one executable per shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import run_experts
from moe_jax.model.layers import Decoder, linear, rope_table

KVCache = list[tuple[jax.Array, jax.Array]]
"""Per layer: keys and values, each [B, S, G, H]."""


class Routed(NamedTuple):
    """What `route` knows of a layer, for R = B * T token rows."""

    residual: jax.Array  # [R, D], after attention is added
    h: jax.Array  # [R, D], normalised: what router and experts see
    logits: jax.Array  # [R, E] float32 router logits
    ids: jax.Array  # [R, K] int32, most probable first
    gates: jax.Array  # [R, K] float32
    outputs: jax.Array  # [R * K, D] zeros: the slots that `experts` fills


class Stages:
    """The jitted stages of one architecture in one compute dtype.

    Attributes:
      embed: (dense, tokens int32 [B, T]) -> x [B, T, D].
      route: (layer weights, rope, x [B, T, D], positions int32 [B, T], kv) -> Routed, kv. Donates kv.
      experts: `moe_jax.model.experts.run_experts`. Donates the output slots.
      combine: (Routed.residual, outputs, gates, x for its shape) -> x [B, T, D]: gates times outputs in router order.
      head: (dense, x [B, T, D], index int32 [B]) -> float32 logits [B, V] at each row's index.
    """

    def __init__(self, a: Architecture, dtype: Any):
        self.architecture, self.dtype = a, dtype
        decoder = nnx.eval_shape(lambda: Decoder(a, dtype, rngs=nnx.Rngs(0)))
        layer_graph = nnx.graphdef(decoder.layers[0])  # the layers have one structure
        norm_graph = nnx.graphdef(decoder.norm)

        def embed(dense, tokens):
            return dense["embedding"][tokens]

        def route(layer_weights, rope, x, positions, kv):
            layer = nnx.merge(layer_graph, layer_weights)
            attended, kv = layer.attention.cached(layer.attention_norm(x), positions, rope, kv)
            residual = (x + attended).reshape(-1, a.d_model)
            h = layer.expert_norm(residual)
            logits = layer.router.logits(h)
            ids, gates = layer.router.choose(logits)
            outputs = jnp.zeros((residual.shape[0] * a.top_k, a.d_model), h.dtype)
            return Routed(residual, h, logits, ids, gates, outputs), kv

        def combine(residual, outputs, gates, x):
            mixed = jnp.einsum("rkd,rk->rd", outputs.reshape(*gates.shape, -1), gates.astype(outputs.dtype))
            return (residual + mixed).reshape(x.shape)

        def head(dense, x, index):
            last = jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
            norm = nnx.merge(norm_graph, dense["norm"])
            return linear(norm(last), dense.get("head", dense["embedding"])).astype(jnp.float32)

        self.embed = jax.jit(embed)
        self.route = jax.jit(route, donate_argnums=4)
        self.experts = jax.jit(run_experts, donate_argnums=0)
        self.combine = jax.jit(combine)
        self.head = jax.jit(head)

    def kv_cache(self, batch: int, capacity: int) -> KVCache:
        """Zeroed cache of `capacity` positions per row."""
        a = self.architecture
        shape = (batch, capacity, a.num_kv_heads, a.head_dim)
        return [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(a.num_layers)]

    def rope(self, capacity: int) -> jax.Array:
        """Rotary table for `capacity` positions, on the device."""
        a = self.architecture
        return jnp.asarray(rope_table(capacity, a.head_dim, a.rope_theta))


def device_weights(dense: Any, dtype: Any) -> dict[str, Any]:
    """Dense checkpoint arrays (a pure dict of `layers.Decoder`) on the device in the compute dtype."""
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x).astype(dtype)), dense)

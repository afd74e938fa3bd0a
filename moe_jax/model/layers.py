"""The dense part of a decoder as Flax NNX modules. Experts are no module's parameters (see `experts.py`): residency
does not fit a module tree."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.architecture import Architecture, GroupedQuery, Latent, LayerKind, SwiGLU
from moe_jax.model.attention import Attention
from moe_jax.model.latent_attention import LatentAttention
from moe_jax.model.primitives import FeedForward, RMSNorm
from moe_jax.model.router import Router

MODULES = {GroupedQuery: Attention, Latent: LatentAttention}
"""The module of each kind of attention."""


class Layer(nnx.Module):
    """The dense part of one decoder layer: everything but the routed experts."""

    def __init__(
        self, a: Architecture, kind: LayerKind, dtype, *, rngs: nnx.Rngs, std: float = 0.02, out_std: float = 0.02
    ):
        self.attention_norm = RMSNorm(a.d_model, a.norm_eps, dtype)
        self.attention = MODULES[type(a.attention)](a, kind, dtype, rngs=rngs, std=std)
        self.attention.out[...] = self.attention.out[...] * (out_std / std)
        self.expert_norm = RMSNorm(a.d_model, a.norm_eps, dtype)  # before the experts, or the dense feed-forward
        feed = lambda ff, gate: FeedForward(a.d_model, ff, SwiGLU(), gate, dtype, rngs=rngs, std=std)
        self.router = Router(a, dtype, rngs=rngs, std=std) if kind.dense_ff is None else None
        self.feed_forward = feed(kind.dense_ff, False) if kind.dense_ff is not None else None
        self.shared = feed(a.shared.ff, a.shared.gated) if a.shared and kind.dense_ff is None else None


class Decoder(nnx.Module):
    """All dense weights of the model. The output head is the embedding when the two are tied."""

    def __init__(self, a: Architecture, dtype=jnp.float32, *, rngs: nnx.Rngs, std: float = 0.02, out_std: float = 0.02):
        init = nnx.initializers.normal(std)
        self.embedding = nnx.Param(init(rngs.params(), (a.vocab_size, a.d_model), dtype))
        self.layers = nnx.List([Layer(a, kind, dtype, rngs=rngs, std=std, out_std=out_std) for kind in a.layers])
        self.norm = RMSNorm(a.d_model, a.norm_eps, dtype)
        if not a.tie_embeddings:
            self.head = nnx.Param(init(rngs.params(), (a.vocab_size, a.d_model), dtype))

    def head_weight(self) -> jax.Array:
        """Output head [V, D]."""
        return self.head[...] if hasattr(self, "head") else self.embedding[...]


def abstract_dense(a: Architecture, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Shapes and dtypes of all dense weights, as the pure dict of `Decoder`, without memory."""
    return nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: Decoder(a, dtype, rngs=nnx.Rngs(0))))[1])


def parameter_counts(a: Architecture) -> dict[str, int]:
    """Numbers of parameters: "dense", one "expert", "total", and "active" per token (all dense ones and K experts in
    every layer that has them: what models are named after)."""
    dense = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_dense(a)))
    expert = sum(math.prod(shape) for shape in a.expert_shapes().values())
    return {
        "dense": dense,
        "expert": expert,
        "total": dense + a.num_moe_layers * a.num_experts * expert,
        "active": dense + a.num_moe_layers * a.top_k * expert,
    }

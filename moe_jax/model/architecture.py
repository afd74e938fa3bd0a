"""What a decoder looks like: frozen descriptions, which layers and stages dispatch on. No model has a name here.

Families (`moe_jax/checkpoint/families`) read a `config.json` into an `Architecture`; everything above sees only that.

Dims legend (used in names, einsums and annotations everywhere):
B batch, T tokens, S cached positions, D model, N query heads, G key/value heads, H head width,
L layers, E experts, K active experts per token, F expert hidden, V vocabulary, R token rows (B * T flattened).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from moe_jax.model.rope import Rope


@dataclasses.dataclass(frozen=True)
class GroupedQuery:
    """Grouped-query attention (arXiv 2305.13245) with rotary positions over whole heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # independent of D
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm of q and k: each head's H, or all heads' N * H as one
    clip_qkv: float | None = None  # q, k and v are clipped to [-clip, clip], after the norm
    sinks: bool = False  # one learned logit per head joins the softmax and is dropped (GPT-OSS)

    @property
    def rope_dim(self) -> int:
        """Width that is rotated."""
        return self.head_dim


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are made of a narrow latent; part of
    each head is rotated, and the rotated key is shared by all heads."""

    num_heads: int
    kv_rank: int  # width of the latent
    nope_dim: int  # of a head's query and key, what is not rotated
    rope_dim: int  # ... and what is
    v_dim: int
    score_scale: float  # of the scores; some rope scalings change it
    q_rank: int | None = None  # queries are made of a latent too; None: of the residual
    bias: bool = False  # of the projections to the latents and to the residual stream
    norm_eps: float = 1e-6  # of the latents' norms


AttentionKind = GroupedQuery | Latent


@dataclasses.dataclass(frozen=True)
class Routing:
    """From router logits to expert ids and gates: score, mask by group, choose K, renormalise, scale."""

    top_k: int
    scoring: Literal["softmax", "sigmoid", "softmax_chosen"] = "softmax"  # the last: softmax over the K chosen logits
    renormalise: bool = True  # gates sum to 1 (before `scale`)
    bias: bool = False
    correction_bias: bool = False  # added to the scores for the choice only (DeepSeek-V3, arXiv 2412.19437, eq. 16)
    num_groups: int = 1  # consecutive experts form a group; experts outside the best `groups_kept` are never chosen
    groups_kept: int = 1
    group_score: Literal["max", "top2"] = "max"  # a group's score: its best expert's, or the sum of its best two
    scale: float = 1.0
    float32: bool = False  # logits are computed in float32 whatever the compute dtype


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """silu(gate) * up (arXiv 2002.05202)."""


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU:
    """(up + 1) * gate * sigmoid(alpha * gate) with gate <= limit and |up| <= limit (GPT-OSS)."""

    limit: float
    alpha: float
    interleaved: bool = True  # rows of gate_up alternate: gate, up, gate, up


Activation = SwiGLU | ClampedSwiGLU


@dataclasses.dataclass(frozen=True)
class Experts:
    """The routed experts of a layer."""

    num_experts: int
    ff: int
    activation: Activation = SwiGLU()
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class SharedExpert:
    """A feed-forward that every token passes beside its routed experts. It stays on the device."""

    ff: int
    gated: bool = False  # times the sigmoid of a learned projection (Qwen2-MoE)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """In what the layers of one model differ. Layers of one kind share their executables."""

    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None: all before it
    dense_ff: int | None = None  # width of a dense feed-forward in place of experts; None: experts


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A decoder. Hashable, so it can be a static jit argument.

    Layers are numbered 0..L-1. Everything about experts (sources, banks, predictors, traces, the engine's records)
    numbers the layers that have experts 0..num_moe_layers-1; `moe_layers` maps the latter to the former.
    """

    vocab_size: int
    d_model: int
    layers: tuple[LayerKind, ...]
    attention: AttentionKind
    rope: Rope
    routing: Routing
    experts: Experts
    max_seq_len: int
    shared: SharedExpert | None = None  # in every layer that has experts
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @functools.cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        return tuple(i for i, kind in enumerate(self.layers) if kind.dense_ff is None)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def top_k(self) -> int:
        return self.routing.top_k

    def expert_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the unquantised arrays of one expert, by field of `ExpertWeights`."""
        f, d = self.experts.ff, self.d_model
        shapes: dict[str, tuple[int, ...]] = {"gate_up": (2 * f, d), "down": (d, f)}
        return shapes | ({"gate_up_bias": (2 * f,), "down_bias": (d,)} if self.experts.bias else {})

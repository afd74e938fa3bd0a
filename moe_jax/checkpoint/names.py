"""How our arrays lie in a checkpoint: which tensors, whole or in slices, stacked along rows, make one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.model.architecture import Architecture, GroupedQuery
from moe_jax.model.experts import ExpertWeights
from moe_jax.model.quantized import Mxfp4

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in every family
Path = tuple[str | int, ...]
"""Where a dense array lies in the pure dict of `moe_jax.model.layers.Decoder`."""


class Piece(NamedTuple):
    """A checkpoint tensor, or one slice of it along its first axis (experts stored as one tensor)."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    index: int | None = None
    transposed: bool = False  # it (or its slice) is a matrix `[in, out]`
    dtype: str | None = None  # as safetensors names it; None: any float


Rows = tuple[Piece, ...]
"""Pieces that stacked along rows make one of our arrays."""


class Names(NamedTuple):
    """Every tensor of a checkpoint."""

    dense: dict[Path, Rows]
    expert: Callable[[int, int], dict[str, Rows]]
    """(layer among those with experts, expert) -> the parts of one expert, by field of `ExpertWeights`; those of a
    quantised matrix by field and field, as in "gate_up.blocks"."""
    ignored: Callable[[str], bool] = lambda name: name.endswith(".rotary_emb.inv_freq")  # recomputed from config.json
    """Whether a tensor beyond these may be there, and is not read."""
    unread: tuple[frozenset[str], ...] = ()
    """Groups of tensors that may be there too, each whole or not at all, and are not read."""


def rows(*pieces: tuple[str, tuple[int, ...]]) -> Rows:
    """Whole tensors, (name, shape) each, stacked along rows."""
    return tuple(Piece(name, shape) for name, shape in pieces)


def grouped_query(a: Architecture, layer: int) -> dict[Path, Rows]:
    """Attention under the names that nearly every family gives it."""
    s, d = a.attention, a.d_model
    assert isinstance(s, GroupedQuery)
    prefix, path = f"model.layers.{layer}.self_attn", ("layers", layer, "attention")
    heads = {"q": s.num_heads * s.head_dim, "k": s.num_kv_heads * s.head_dim, "v": s.num_kv_heads * s.head_dim}
    arrays: dict[Path, Rows] = {
        (*path, "qkv"): rows(*((f"{prefix}.{x}_proj.weight", (n, d)) for x, n in heads.items())),
        (*path, "out"): rows((f"{prefix}.o_proj.weight", (d, heads["q"]))),
    }
    if s.qkv_bias:
        arrays[*path, "qkv_bias"] = rows(*((f"{prefix}.{x}_proj.bias", (n,)) for x, n in heads.items()))
    if s.out_bias:
        arrays[*path, "out_bias"] = rows((f"{prefix}.o_proj.bias", (d,)))
    if s.qk_norm != "none":
        for x in "qk":
            width = s.head_dim if s.qk_norm == "head" else heads[x]
            arrays[*path, f"{x}_norm", "weight"] = rows((f"{prefix}.{x}_norm.weight", (width,)))
    if s.sinks:
        arrays[*path, "sinks"] = rows((f"{prefix}.sinks", (s.num_heads,)))
    return arrays


def feed_forward(prefix: str, path: Path, d: int, ff: int) -> dict[Path, Rows]:
    """A dense SwiGLU feed-forward (or a shared expert) under the names that nearly every family gives it."""
    return {
        (*path, "gate_up"): rows((f"{prefix}.gate_proj.weight", (ff, d)), (f"{prefix}.up_proj.weight", (ff, d))),
        (*path, "down"): rows((f"{prefix}.down_proj.weight", (d, ff))),
    }


def dense(
    a: Architecture,
    router: str = "mlp.gate",
    attention: Callable[[Architecture, int], dict[Path, Rows]] = grouped_query,
    shared: str = "mlp.shared_expert",
    correction_bias: str = "mlp.gate.e_score_correction_bias",
) -> dict[Path, Rows]:
    """Every dense array of the usual decoder; the arguments are where families differ."""
    d, E = a.d_model, a.num_experts
    arrays = {
        ("embedding",): rows((EMBEDDING, (a.vocab_size, d))),
        ("norm", "weight"): rows(("model.norm.weight", (d,))),
    }
    if not a.tie_embeddings:
        arrays["head",] = rows((HEAD, (a.vocab_size, d)))
    for layer, kind in enumerate(a.layers):
        prefix, path = f"model.layers.{layer}", ("layers", layer)
        arrays[*path, "attention_norm", "weight"] = rows((f"{prefix}.input_layernorm.weight", (d,)))
        arrays |= attention(a, layer)
        arrays[*path, "expert_norm", "weight"] = rows((f"{prefix}.post_attention_layernorm.weight", (d,)))
        if kind.dense_ff is not None:
            arrays |= feed_forward(f"{prefix}.mlp", (*path, "feed_forward"), d, kind.dense_ff)
            continue
        arrays[*path, "router", "weight"] = rows((f"{prefix}.{router}.weight", (E, d)))
        if a.routing.bias:
            arrays[*path, "router", "bias"] = rows((f"{prefix}.{router}.bias", (E,)))
        if a.routing.correction_bias:
            arrays[*path, "router", "correction_bias"] = rows((f"{prefix}.{correction_bias}", (E,)))
        if a.shared:
            arrays |= feed_forward(f"{prefix}.{shared}", (*path, "shared"), d, a.shared.ff)
            if a.shared.gated:
                arrays[*path, "shared", "gate"] = rows((f"{prefix}.{shared}_gate.weight", (1, d)))
    return arrays


def per_expert(
    a: Architecture, prefix: str = "mlp.experts", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Callable[[int, int], dict[str, Rows]]:
    """`Names.expert` of the layout with three tensors per expert."""
    f, d = a.experts.ff, a.d_model

    def expert(layer: int, e: int) -> dict[str, Rows]:
        here = f"model.layers.{a.moe_layers[layer]}.{prefix}.{e}"
        return {
            "gate_up": rows((f"{here}.{gate}.weight", (f, d)), (f"{here}.{up}.weight", (f, d))),
            "down": rows((f"{here}.{down}.weight", (d, f))),
        }

    return expert


def fused_experts(a: Architecture, prefix: str = "mlp.experts") -> Callable[[int, int], dict[str, Rows]]:
    """`Names.expert` of the layout with two tensors per layer, experts along the first axis."""
    f, d, E = a.experts.ff, a.d_model, a.num_experts

    def expert(layer: int, e: int) -> dict[str, Rows]:
        here = f"model.layers.{a.moe_layers[layer]}.{prefix}"
        return {
            "gate_up": (Piece(f"{here}.gate_up_proj", (E, 2 * f, d), e),),
            "down": (Piece(f"{here}.down_proj", (E, d, f), e),),
        }

    return expert


def expert_weights(parts: Mapping[str, Any], matrix: Any = Mxfp4) -> ExpertWeights:
    """What stands for each part ("down", or "down.scales" of a quantised matrix, of type `matrix`), put together."""
    fields: dict[str, Any] = {}
    for part, value in parts.items():
        field, _, inner = part.partition(".")
        if inner:
            fields.setdefault(field, {})[inner] = value
        else:
            fields[field] = value
    return ExpertWeights(**{name: matrix(**x) if isinstance(x, dict) else x for name, x in fields.items()})


def standard_layouts(a: Architecture) -> tuple[Names, ...]:
    """Per-expert and fused layout of the families that use the usual names throughout."""
    return Names(dense(a), per_expert(a)), Names(dense(a), fused_experts(a))

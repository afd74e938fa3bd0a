"""Qwen2-MoE (Qwen1.5-MoE, arXiv 2407.10671): attention bias, a gated shared expert beside the routed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.checkpoint.config_reader import ConfigReader
from moe_jax.checkpoint.families.qwen3_moe import sparse_layers
from moe_jax.checkpoint.names import standard_layouts as layouts
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture, Experts, GroupedQuery, LayerKind, Routing, SharedExpert

__all__ = ["layouts", "read_config"]


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The dictionary of a Qwen2-MoE `config.json`."""
    absent = {"num_key_value_heads": 16, "shared_expert_intermediate_size": 5632}  # as transformers has it then
    c = ConfigReader({**absent, **config})
    c.require("hidden_act", "silu", default="silu")
    heads, d_model = c.size("num_attention_heads"), c.size("hidden_size")
    max_seq_len = c.size("max_position_embeddings")
    sparse = sparse_layers(c)
    dense_ff = c.size("intermediate_size", 5632)
    windows = _windows(c, len(sparse))
    a = Architecture(
        vocab_size=c.size("vocab_size"),
        d_model=d_model,
        layers=tuple(LayerKind(w, None if s else dense_ff) for w, s in zip(windows, sparse, strict=True)),
        attention=GroupedQuery(
            heads,
            c.size("num_key_value_heads", heads),
            c.size("head_dim", d_model // heads),
            qkv_bias=c.flag("qkv_bias", True),
        ),
        rope=c.rope(max_seq_len),
        routing=Routing(c.size("num_experts_per_tok"), renormalise=c.flag("norm_topk_prob", False)),
        experts=Experts(c.size(c.named("num_experts", "num_local_experts")), c.size("moe_intermediate_size")),
        shared=SharedExpert(c.size("shared_expert_intermediate_size"), gated=True),
        max_seq_len=max_seq_len,
        norm_eps=c.number("rms_norm_eps", 1e-6),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        **c.special_tokens(),
    )
    return c.finish(a)


def _windows(c: ConfigReader, count: int) -> list[int | None]:
    """The sliding window of every layer."""
    enabled, width = c.flag("use_sliding_window", False), c.size("sliding_window", 0, least=0)
    last = c.size("max_window_layers", 28, least=0)
    # The default as in transformers: even layers below max_window_layers.
    sliding = c.sliding_layers([i % 2 == 0 and i < last and enabled for i in range(count)])
    if any(sliding) and not (enabled and width):
        raise UserError(
            f"config.json has layer_types with 'sliding_attention', but use_sliding_window={enabled} and"
            f" sliding_window={width}"
        )
    return [width if slides else None for slides in sliding]

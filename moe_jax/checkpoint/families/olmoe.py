"""OLMoE (arXiv 2409.02060): q/k norm over all heads as one vector, optionally clipped q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.checkpoint.config_reader import ConfigReader
from moe_jax.checkpoint.names import standard_layouts as layouts
from moe_jax.model.architecture import Architecture, Experts, GroupedQuery, LayerKind, Routing

__all__ = ["layouts", "read_config"]


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The dictionary of an OLMoE `config.json`."""
    c = ConfigReader(config)
    c.require("hidden_act", "silu", default="silu")
    heads, d_model = c.size("num_attention_heads"), c.size("hidden_size")
    max_seq_len = c.size("max_position_embeddings")
    # The norms' widths follow from hidden_size, so that a head width of its own cannot be meant.
    head_dim = d_model // heads
    c.require("head_dim", head_dim, default=head_dim)
    c.require("sliding_window", None)
    bias = c.flag("attention_bias", False)
    a = Architecture(
        vocab_size=c.size("vocab_size"),
        d_model=d_model,
        layers=(LayerKind(),) * c.size("num_hidden_layers"),
        attention=GroupedQuery(
            heads,
            c.size("num_key_value_heads", heads),
            head_dim,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="full",
            clip_qkv=c.number("clip_qkv", None),
        ),
        rope=c.rope(max_seq_len),
        routing=Routing(c.size("num_experts_per_tok"), renormalise=c.flag("norm_topk_prob", False)),
        experts=Experts(c.size(c.named("num_experts", "num_local_experts")), c.size("intermediate_size")),
        max_seq_len=max_seq_len,
        norm_eps=c.number("rms_norm_eps", 1e-5),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        **c.special_tokens(),
    )
    return c.finish(a)

"""Qwen3-MoE (arXiv 2505.09388): per-head q/k norm, optionally dense layers between those with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.checkpoint import fp8
from moe_jax.checkpoint.config_reader import ConfigReader
from moe_jax.checkpoint.names import standard_layouts as layouts
from moe_jax.model.architecture import Architecture, Experts, GroupedQuery, LayerKind, Routing

__all__ = ["layouts", "read_config"]


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The dictionary of a Qwen3-MoE `config.json`."""
    c = ConfigReader({"num_key_value_heads": 4, **config})  # what transformers takes where it is absent
    c.require("hidden_act", "silu", default="silu")
    c.get("max_window_layers", None)  # Qwen3-MoE has a window in every layer or in none
    # Qwen3-Coder says these again.
    c.require("use_qk_norm", True, default=True)
    c.require("qkv_bias", False, default=False)
    c.require("shared_expert_intermediate_size", 0, default=0)
    if quantization := c.mapping("quantization_config"):
        fp8.block_of(quantization)  # as Qwen3-30B-A3B-FP8; refuses what is not read
    heads, d_model = c.size("num_attention_heads"), c.size("hidden_size")
    max_seq_len = c.size("max_position_embeddings")
    bias = c.flag("attention_bias", False)
    c.get("sliding_window", None)
    window = c.size("sliding_window") if c.flag("use_sliding_window", False) else None
    dense_ff = c.size("intermediate_size", 6144)
    a = Architecture(
        vocab_size=c.size("vocab_size"),
        d_model=d_model,
        layers=tuple(LayerKind(window, None if sparse else dense_ff) for sparse in sparse_layers(c)),
        attention=GroupedQuery(
            heads,
            c.size("num_key_value_heads", heads),
            c.size("head_dim", d_model // heads),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="head",
        ),
        rope=c.rope(max_seq_len),
        routing=Routing(c.size("num_experts_per_tok"), renormalise=c.flag("norm_topk_prob", False)),
        experts=Experts(c.size(c.named("num_experts", "num_local_experts")), c.size("moe_intermediate_size")),
        max_seq_len=max_seq_len,
        norm_eps=c.number("rms_norm_eps", 1e-6),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        **c.special_tokens(),
    )
    return c.finish(a)


def sparse_layers(c: ConfigReader) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th one that `mlp_only_layers` does not name."""
    count, step = c.size("num_hidden_layers"), c.size("decoder_sparse_step", 1)
    dense = c.ids("mlp_only_layers")
    return [i not in dense and (i + 1) % step == 0 for i in range(count)]

"""Mixtral (arXiv 2401.04088): grouped-query attention, a renormalised softmax top-k router, SwiGLU experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.checkpoint.config_reader import ConfigReader
from moe_jax.checkpoint.names import Names, dense, fused_experts, per_expert
from moe_jax.model.architecture import Architecture, Experts, GroupedQuery, LayerKind, Routing
from moe_jax.model.rope import Rope


def architecture(
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_experts: int,
    top_k: int,
    expert_ff: int,
    max_seq_len: int,
    rope_theta: float = 1e6,
    window: int | None = None,
    **rest: Any,
) -> Architecture:
    """A Mixtral of these sizes; `rest` are fields of `Architecture`."""
    return Architecture(
        vocab_size=vocab_size,
        d_model=d_model,
        layers=(LayerKind(window),) * num_layers,
        attention=GroupedQuery(num_heads, num_kv_heads, head_dim),
        rope=rest.pop("rope", Rope(rope_theta)),
        routing=Routing(top_k),
        experts=Experts(num_experts, expert_ff),
        max_seq_len=max_seq_len,
        **rest,
    )


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The dictionary of a Mixtral `config.json`."""
    c = ConfigReader({"num_key_value_heads": 8, **config})  # what transformers takes where it is absent
    c.require("hidden_act", "silu", default="silu")
    c.require("attention_bias", False, default=False)
    c.get("router_jitter_noise", 0.0)  # noise of training
    heads, d_model = c.size("num_attention_heads"), c.size("hidden_size")
    max_seq_len = c.size("max_position_embeddings")
    a = architecture(
        vocab_size=c.size("vocab_size"),
        d_model=d_model,
        num_layers=c.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=c.size("num_key_value_heads", heads),
        head_dim=c.size("head_dim", d_model // heads),
        num_experts=c.size(c.named("num_local_experts", "num_experts")),
        top_k=c.size("num_experts_per_tok"),
        expert_ff=c.size("intermediate_size"),
        window=c.size("sliding_window", None),
        max_seq_len=max_seq_len,
        rope=c.rope(max_seq_len, default_theta=1e6),
        norm_eps=c.number("rms_norm_eps", 1e-5),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        **c.special_tokens(),
    )
    return c.finish(a)


def layouts(a: Architecture) -> tuple[Names, ...]:
    """Released: three tensors per expert. Fused: what `transformers` 5 holds in memory."""
    released = dense(a, router="block_sparse_moe.gate"), per_expert(a, "block_sparse_moe.experts", "w1", "w3", "w2")
    return Names(*released), Names(dense(a), fused_experts(a))


def write_config(a: Architecture, dtype: str) -> dict[str, Any]:
    """The `config.json` that `transformers` reads as the same model (inverse of `read_config`)."""
    assert isinstance(a.attention, GroupedQuery) and a.rope == Rope(a.rope.theta)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": a.vocab_size,
        "hidden_size": a.d_model,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.attention.num_heads,
        "num_key_value_heads": a.attention.num_kv_heads,
        "head_dim": a.attention.head_dim,
        "num_local_experts": a.num_experts,
        "num_experts_per_tok": a.top_k,
        "intermediate_size": a.experts.ff,
        "max_position_embeddings": a.max_seq_len,
        "rope_theta": a.rope.theta,
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tie_embeddings,
        "hidden_act": "silu",
        "sliding_window": a.layers[0].window,
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "bos_token_id": a.bos_id,
        "eos_token_id": a.eos_ids[0] if len(a.eos_ids) == 1 else list(a.eos_ids),
        "torch_dtype": dtype,
    }

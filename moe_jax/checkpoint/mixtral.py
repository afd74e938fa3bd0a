"""Hugging Face names and shapes of a Mixtral checkpoint (per-expert layout), and nothing else.

One of our arrays is one or more checkpoint tensors stacked along rows; `Rows` lists them in that order.
"""

from __future__ import annotations

from moe_jax.model.architecture import Architecture

Rows = dict[str, tuple[int, ...]]
"""Checkpoint tensors by name, with their shapes, that stacked along rows make one of our arrays."""


def dense(a: Architecture) -> dict[tuple[str | int, ...], Rows]:
    """Every dense array, by its path in the pure dict of `moe_jax.model.layers.Decoder`."""
    q, kv, d = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, a.d_model
    arrays: dict[tuple[str | int, ...], Rows] = {
        ("embedding",): {"model.embed_tokens.weight": (a.vocab_size, d)},
        ("norm", "weight"): {"model.norm.weight": (d,)},
    }
    if not a.tie_embeddings:
        arrays["head",] = {"lm_head.weight": (a.vocab_size, d)}
    for layer in range(a.num_layers):
        prefix, path = f"model.layers.{layer}", ("layers", layer)
        arrays[*path, "attention_norm", "weight"] = {f"{prefix}.input_layernorm.weight": (d,)}
        arrays[*path, "attention", "qkv"] = {
            f"{prefix}.self_attn.q_proj.weight": (q, d),
            f"{prefix}.self_attn.k_proj.weight": (kv, d),
            f"{prefix}.self_attn.v_proj.weight": (kv, d),
        }
        arrays[*path, "attention", "out"] = {f"{prefix}.self_attn.o_proj.weight": (d, q)}
        arrays[*path, "expert_norm", "weight"] = {f"{prefix}.post_attention_layernorm.weight": (d,)}
        arrays[*path, "router", "weight"] = {f"{prefix}.block_sparse_moe.gate.weight": (a.num_experts, d)}
    return arrays


def expert(a: Architecture, layer: int, expert: int) -> tuple[Rows, Rows]:
    """Gate_up [2F, D] (w1, the gate, above w3, the up projection) and down [D, F] (w2) of one expert."""
    prefix, f, d = f"model.layers.{layer}.block_sparse_moe.experts.{expert}", a.expert_ff, a.d_model
    return {f"{prefix}.w1.weight": (f, d), f"{prefix}.w3.weight": (f, d)}, {f"{prefix}.w2.weight": (d, f)}

"""The slow dense reference: Mixtral in a few lines of float64 NumPy, every expert on every token, no cache.

Reads the Hugging Face names itself, so that it shares nothing with the code it checks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open

from moe_jax.model.architecture import Architecture, GroupedQuery


def read(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor as float64."""
    with safe_open(directory / "model.safetensors", "flax") as file:
        return {name: np.asarray(file.get_tensor(name), np.float64) for name in file.keys()}  # noqa: SIM118


Override = Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]
"""(layer, residual after attention [T, D], router logits [T, E], gates [T, E]) changes gates: 0 is an idle expert."""


def forward(
    a: Architecture,
    w: dict[str, np.ndarray],
    tokens: list[int],
    override: Override | None = None,
    seen: list[tuple[np.ndarray, ...]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] after each token, and the experts [L, T, K] that the router chose.

    `seen` gets, for every layer, the residual after attention [T, D], the gates [T, E] (0 where not chosen) and the
    outputs of all experts [T, E, D].
    """
    norm = lambda x, weight: weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + a.norm_eps)
    silu = lambda x: x / (1 + np.exp(-x))
    assert isinstance(a.attention, GroupedQuery)
    softmax = lambda x: (
        np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
    )
    T, half, chosen = len(tokens), a.attention.head_dim // 2, []
    angle = np.arange(T)[:, None] / a.rope.theta ** (np.arange(half) / half)

    def rotate(x):  # [T, heads, H]
        x1, x2 = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(a.num_layers):
        p = f"model.layers.{layer}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((h @ w[f"{p}self_attn.{n}_proj.weight"].T).reshape(T, -1, a.attention.head_dim) for n in "qkv")
        q, k = rotate(q), rotate(k)
        heads = []
        for n in range(a.attention.num_heads):
            g = n // (a.attention.num_heads // a.attention.num_kv_heads)
            scores = q[:, n] @ k[:, g].T / np.sqrt(a.attention.head_dim)
            scores[np.triu_indices(T, 1)] = -np.inf
            heads.append(softmax(scores) @ v[:, g])
        x = x + np.concatenate(heads, -1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        router_logits = h @ w[p + "block_sparse_moe.gate.weight"].T
        probability = softmax(router_logits)
        ids = np.argsort(-probability, -1, kind="stable")[:, : a.top_k]
        gates = np.zeros_like(probability)
        np.put_along_axis(gates, ids, np.take_along_axis(probability, ids, -1), -1)
        gates /= gates.sum(-1, keepdims=True)
        if override:
            override(layer, x, router_logits, gates)
        outputs = []
        for e in range(a.num_experts):
            w1, w2, w3 = (w[f"{p}block_sparse_moe.experts.{e}.w{i}.weight"] for i in (1, 2, 3))
            outputs.append((silu(h @ w1.T) * (h @ w3.T)) @ w2.T)
        if seen is not None:
            seen.append((x, gates, np.stack(outputs, 1)))
        x = x + np.einsum("te,ted->td", gates, np.stack(outputs, 1))
        chosen.append(ids)
    head = w["model.embed_tokens.weight"] if a.tie_embeddings else w["lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ head.T, np.stack(chosen)

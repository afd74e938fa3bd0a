"""The models that people use, built abstractly at their real sizes, weigh what their publishers say, and what the
tables in `configs/` say. `config.json` files are the released ones, without what the reader need not know."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from moe_jax.checkpoint.families import family
from moe_jax.model.layers import MODULES, abstract_dense, parameter_counts

BF16 = 2  # bytes


class Released(NamedTuple):
    """A released model.

    Attributes:
      document: the module under configs/ whose table describes it.
      config: its config.json.
      total_bytes: `metadata.total_size` of its model.safetensors.index.json, all of it in bfloat16.
      active: active parameters as its publisher counts them, in 1e9, to the digits published.
    """

    document: str
    config: dict[str, Any]
    total_bytes: int
    active: str


MODELS = {
    "Mixtral-8x7B": Released(
        "mixtral",
        {
            "model_type": "mixtral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        93405585408,
        "12.9",  # arXiv 2401.04088: 13B
    ),
    "Qwen3-30B-A3B": Released(
        "qwen3_moe",
        {
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        61064245248,
        "3.4",  # arXiv 2505.09388: 3B; the model card says 3.3B
    ),
    "OLMoE-1B-7B": Released(
        "olmoe",
        {
            "model_type": "olmoe",
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 50304,
        },
        13838323712,
        "1.3",  # arXiv 2409.02060, table 1
    ),
    "Qwen1.5-MoE-A2.7B": Released(
        "qwen2_moe",
        {
            "model_type": "qwen2_moe",
            "decoder_sparse_step": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        28631568384,  # the model card: 14.3B
        "2.7",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_weighs_what_its_publisher_says(name):
    model = MODELS[name]
    chosen = family(model.config)
    a = chosen.read_config(model.config)
    counts = parameter_counts(a)
    assert counts["total"] * BF16 == model.total_bytes
    assert f"{counts['active'] / 1e9:.{len(model.active.split('.')[1])}f}" == model.active
    for names in chosen.layouts(a):
        arrays = [*names.dense.values()]
        arrays += [rows for layer in range(a.num_moe_layers) for e in range(a.num_experts)
                   for rows in names.expert(layer, e).values()]  # fmt: skip
        tensors = {piece.name: math.prod(piece.shape) for rows in arrays for piece in rows}
        assert sum(tensors.values()) * BF16 == model.total_bytes


@pytest.mark.parametrize("name", MODELS)
def test_its_document_says_so(name):
    model = MODELS[name]
    a = family(model.config).read_config(model.config)
    document = importlib.import_module(f"configs.{model.document}").__doc__
    counts = parameter_counts(a)
    dense = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract_dense(a, jnp.bfloat16)))
    expert, experts = counts["expert"] * BF16, a.num_moe_layers * a.num_experts
    cache = sum(math.prod(s) for s in MODULES[type(a.attention)].cache_shapes(a.attention, 1, 1)) * a.num_layers * BF16
    for figure in (
        f"{counts['total'] / 1e9:.3g}e9, {counts['active'] / 1e9:.3g}e9",
        f"{expert / 1e6:.3g} MB",
        f"all {experts} experts",
        f"{experts * expert / 1e9:.1f} GB",
        f"{dense / 1e9:.1f} GB",
        f"{a.top_k} experts = {a.top_k * expert / 1e6:.0f} MB",
        f"{cache / 1e3:.0f} kB per token",
        f"{a.num_moe_layers} * {a.top_k} * ",
        f"= {a.num_moe_layers * a.top_k * expert / 1e9:.3g} GB",
        f"{a.vocab_size}, {a.max_seq_len}",
    ):
        assert figure in document, f"configs/{model.document}.py does not say {figure!r}"

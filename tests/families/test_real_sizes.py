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
from moe_jax.checkpoint.names import Piece
from moe_jax.model.layers import MODULES, abstract_dense, parameter_counts

BF16 = 2  # bytes


class Released(NamedTuple):
    """A released model.

    Attributes:
      document: the module under configs/ whose table describes it.
      config: its config.json.
      total_bytes: `metadata.total_size` of its model.safetensors.index.json; bfloat16, but for MXFP4 experts.
      active: active parameters as its publisher counts them, in 1e9, to the digits published.
      total: all parameters, likewise; None: their bytes say it.
      embedding: whether the publisher counts it among the active ones.
    """

    document: str
    config: dict[str, Any]
    total_bytes: int
    active: str
    total: str | None = None
    embedding: bool = True


DEEPSEEK_YARN = {
    "type": "yarn",
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
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
    # arXiv 2508.10925, table 1: the active parameters are counted with the output head, without the embedding.
    "gpt-oss-20b": Released(
        "gpt_oss",
        {
            **GPT_OSS,
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
        },
        13761264768,
        "3.61",
        total="20.91",
        embedding=False,
    ),
    "gpt-oss-120b": Released(
        "gpt_oss",
        {
            **GPT_OSS,
            "num_hidden_layers": 36,
            "num_local_experts": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 18,
        },
        65248815744,
        "5.13",
        total="116.83",
        embedding=False,
    ),
    "DeepSeek-V2-Lite": Released(
        "deepseek",
        {
            "model_type": "deepseek_v2",
            "attention_bias": False,
            "aux_loss_alpha": 0.001,
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "pretraining_tp": 1,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {**DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            "rope_theta": 10000,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "seq_aux": True,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "greedy",
            "v_head_dim": 128,
            "vocab_size": 102400,
        },
        31412968448,
        "2.5",  # arXiv 2405.04434, appendix B: 2.4B, which is 2.45 rounded down
        embedding=False,
    ),
    "DeepSeek-V3": Released(
        "deepseek",
        {
            "model_type": "deepseek_v3",
            "attention_bias": False,
            "aux_loss_alpha": 0.001,
            "ep_size": 1,
            "first_k_dense_replace": 3,
            "hidden_act": "silu",
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "pretraining_tp": 1,
            "q_lora_rank": 1536,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "seq_aux": True,
            "tie_word_embeddings": False,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "v_head_dim": 128,
            "vocab_size": 129280,
        },
        # The index counts 2 bytes for every element, also of the layer for multi-token prediction (with its copies of
        # embedding and head) and of the FP8 weights' scales.
        1369062772000 - BF16 * 13463426304 - BF16 * 41540496,
        "36.6",  # README_WEIGHTS.md: 36.6B; arXiv 2412.19437: 37B
        embedding=False,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_weighs_what_its_publisher_says(name):
    model = MODELS[name]
    chosen = family(model.config)
    a = chosen.read_config(model.config)
    counts = parameter_counts(a)
    active = counts["active"] - (0 if model.embedding else a.vocab_size * a.d_model)
    assert f"{active / 1e9:.{len(model.active.split('.')[1])}f}" == model.active
    assert model.total in (None, f"{counts['total'] / 1e9:.2f}")
    for i, names in enumerate(chosen.layouts(a)):
        arrays = [*names.dense.values()]
        arrays += [rows for layer in range(a.num_moe_layers) for e in range(a.num_experts)
                   for rows in names.expert(layer, e).values()]  # fmt: skip
        tensors = {piece.name: (_parameters(piece), _bytes(piece)) for rows in arrays for piece in rows}
        parameters, total_bytes = map(sum, zip(*tensors.values(), strict=True))
        assert parameters == counts["total"]
        assert i or total_bytes == model.total_bytes


@pytest.mark.parametrize("name", MODELS)
def test_its_document_says_so(name):
    model = MODELS[name]
    a = family(model.config).read_config(model.config)
    document = importlib.import_module(f"configs.{model.document}").__doc__
    counts = parameter_counts(a)
    dense = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract_dense(a, jnp.bfloat16)))
    released = family(model.config).layouts(a)[0].expert(0, 0)
    expert = sum(
        _bytes(piece) // (piece.shape[0] if piece.index is not None else 1)
        for rows in released.values()
        for piece in rows
    )
    experts = a.num_moe_layers * a.num_experts
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


def _bytes(piece: Piece) -> int:
    return math.prod(piece.shape) * (1 if piece.dtype == "U8" else BF16)


def _parameters(piece: Piece) -> int:
    """Two in a byte of MXFP4's blocks, none in a scale."""
    per_element = {"_blocks": 2, "_scales": 0}.get(piece.name[-7:], 1)
    return math.prod(piece.shape) * per_element

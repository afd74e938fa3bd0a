"""Configurations drawn at random, every optional feature on or off: see `tests/families/parity.py`.

The tables of the other files hold what is known to matter; these find what nobody thought of. More of them:

    MOE_JAX_RANDOM_CASES=100:120 pytest -m slow tests/families/test_random.py
"""

import os
import random
from typing import Any

import pytest

from tests.families import parity
from tests.families.parity import Case

transformers = pytest.importorskip("transformers")
FIRST, END = map(int, os.environ.get("MOE_JAX_RANDOM_CASES", "0:1").split(":"))


def rope(r: random.Random) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": r.uniform(1.5, 4)},
        {
            "rope_type": "yarn",
            "factor": r.uniform(2, 16),
            "original_max_position_embeddings": r.randint(8, 33),
            "beta_fast": r.uniform(3, 32),
            "beta_slow": r.uniform(0.5, 2),
            "truncate": r.random() < 0.5,
            **({"attention_factor": r.uniform(0.7, 1.4)} if r.random() < 0.5 else {}),
        },
        {
            "rope_type": "llama3",
            "factor": r.uniform(2, 8),
            "low_freq_factor": 1.0,
            "high_freq_factor": r.uniform(2, 6),
            "original_max_position_embeddings": r.randint(8, 33),
        },
    ]
    return {"rope_theta": r.choice([30.0, 100.0, 1e4]), **r.choice(kinds)}


def sizes(r: random.Random, **more: Any) -> dict[str, Any]:
    groups, experts = r.randint(1, 3), r.randint(2, 12)
    return dict(
        vocab_size=r.randint(40, 80),
        hidden_size=2 * r.randint(6, 14),
        num_hidden_layers=r.randint(2, 4),
        num_attention_heads=groups * r.randint(1, 3),
        num_key_value_heads=groups,
        num_experts_per_tok=r.randint(1, min(8, experts)),
        max_position_embeddings=r.choice([80, 128, 256]),
        rms_norm_eps=1e-3,
        tie_word_embeddings=r.random() < 0.5,
        rope_parameters=rope(r),
        **{name: experts if value is None else value for name, value in more.items()},
    )


def flag(r: random.Random) -> bool:
    return r.random() < 0.5


def window(r: random.Random) -> int:
    return r.randint(1, 20)


def mixtral(r: random.Random) -> Any:
    return transformers.MixtralConfig(
        **sizes(r, num_local_experts=None, intermediate_size=r.randint(3, 20), head_dim=2 * r.randint(2, 6)),
        sliding_window=window(r) if flag(r) else None,
    )


def dense_layers(r: random.Random, layers: int) -> dict[str, Any]:
    """At least one layer keeps its experts: the last one, also where every second one has them."""
    if flag(r):
        return dict(mlp_only_layers=r.sample(range(layers - 1), r.randint(0, layers - 1)))
    return dict(decoder_sparse_step=2 if layers % 2 == 0 else 1)


def qwen3_moe(r: random.Random) -> Any:
    common = sizes(r, num_experts=None, moe_intermediate_size=r.randint(3, 20), head_dim=2 * r.randint(2, 6))
    sliding = flag(r)
    return transformers.Qwen3MoeConfig(
        **common,
        intermediate_size=r.randint(3, 30),
        attention_bias=flag(r),
        norm_topk_prob=flag(r),
        use_sliding_window=sliding,
        sliding_window=window(r) if sliding else None,
        **dense_layers(r, common["num_hidden_layers"]),
    )


def qwen2_moe(r: random.Random) -> Any:
    common = sizes(r, num_experts=None, moe_intermediate_size=r.randint(3, 20), head_dim=2 * r.randint(2, 6))
    return transformers.Qwen2MoeConfig(
        **common,
        intermediate_size=r.randint(3, 30),
        shared_expert_intermediate_size=r.randint(3, 20),
        qkv_bias=flag(r),
        norm_topk_prob=flag(r),
        use_sliding_window=flag(r),
        sliding_window=window(r),
        max_window_layers=r.randint(0, common["num_hidden_layers"]),
        **dense_layers(r, common["num_hidden_layers"]),
    )


def olmoe(r: random.Random) -> Any:
    common = sizes(r, num_experts=None, intermediate_size=r.randint(3, 20))
    common["hidden_size"] = common["num_attention_heads"] * 2 * r.randint(2, 5)
    return transformers.OlmoeConfig(
        **common,
        eos_token_id=2,
        attention_bias=flag(r),
        clip_qkv=r.uniform(0.5, 2) if flag(r) else None,
        norm_topk_prob=flag(r),
    )


def gpt_oss(r: random.Random) -> Any:
    common = sizes(r, num_local_experts=None, intermediate_size=r.randint(3, 20), head_dim=2 * r.randint(2, 6))
    kinds = ["full_attention", "sliding_attention"]
    return transformers.GptOssConfig(
        **common,
        attention_bias=flag(r),
        sliding_window=window(r),
        swiglu_limit=r.uniform(0.5, 7),
        **({"layer_types": r.choices(kinds, k=common["num_hidden_layers"])} if flag(r) else {}),
    )


def deepseek(r: random.Random) -> dict[str, Any]:
    groups, of_each = r.randint(1, 4), r.randint(2, 4)
    kept = r.randint(1, groups)
    common = sizes(r, n_routed_experts=groups * of_each, moe_intermediate_size=r.randint(3, 20))
    if common["rope_parameters"]["rope_type"] == "yarn" and flag(r):
        common["rope_parameters"] |= {"mscale": r.uniform(0.5, 1.5), "mscale_all_dim": r.uniform(0.5, 1.5)}
        common["rope_parameters"].pop("attention_factor", None)
    heads = common["num_attention_heads"]
    return dict(
        **common | {"num_key_value_heads": heads, "hidden_size": heads * r.randint(3, 7)},
        n_group=groups,
        topk_group=kept,
        intermediate_size=r.randint(3, 30),
        first_k_dense_replace=r.randint(0, common["num_hidden_layers"] - 1),
        qk_nope_head_dim=r.randint(1, 12),
        qk_rope_head_dim=2 * r.randint(1, 5),
        v_head_dim=r.randint(1, 12),
        kv_lora_rank=r.randint(2, 16),
        q_lora_rank=r.choice([None, r.randint(2, 16)]),
        n_shared_experts=r.randint(1, 3),
        routed_scaling_factor=r.uniform(0.5, 3),
        attention_bias=flag(r),
    ) | {"num_experts_per_tok": r.randint(1, min(8, kept * of_each))}


def deepseek_v2(r: random.Random) -> Any:
    # transformers views pairs as complex numbers, which torch refuses at odd strides.
    even = dict(qk_nope_head_dim=2 * r.randint(1, 6), kv_lora_rank=2 * r.randint(1, 8))
    return transformers.DeepseekV2Config(**deepseek(r) | even, topk_method=r.choice(["greedy", "group_limited_greedy"]))


def deepseek_v3(r: random.Random) -> Any:
    return transformers.DeepseekV3Config(**deepseek(r), norm_topk_prob=flag(r), rope_interleave=flag(r))


FAMILIES = mixtral, qwen3_moe, qwen2_moe, olmoe, gpt_oss, deepseek_v2, deepseek_v3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, END))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_same_model(family, seed):
    r = random.Random(f"{family.__name__} {seed}")
    parity.same_model(Case(f"{family.__name__} {seed}", family(r), fused=flag(r)))

"""Qwen2-MoE: see `tests/families/parity.py`."""

import pytest

from tests.families import parity
from tests.families.parity import Case, no_windows, without

transformers = pytest.importorskip("transformers")


def config(**changes):
    sizes = dict(
        vocab_size=59,
        hidden_size=18,
        intermediate_size=26,
        moe_intermediate_size=10,
        shared_expert_intermediate_size=22,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_experts=5,
        num_experts_per_tok=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    return transformers.Qwen2MoeConfig(**{**sizes, **changes})


SHARED = {
    "the shared expert": without(shared=None),
    "the shared expert's gate": without(shared=dict(gated=False)),
}
CASES = [
    Case(
        "released_shape",
        config(),
        {
            **SHARED,
            "q/k/v bias": without(attention=dict(qkv_bias=False)),
            "gates as they are": without(routing=dict(renormalise=True)),
        },
    ),
    Case(
        "windowed_dense_layers_no_bias",
        config(
            qkv_bias=False,
            mlp_only_layers=[1],
            num_hidden_layers=4,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=3,
            norm_topk_prob=True,
            num_attention_heads=9,
            num_key_value_heads=3,
            num_experts=7,
            num_experts_per_tok=1,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5},
        ),
        {**SHARED, "the sliding window": no_windows, "linear rope": without(rope=dict(scaling=None))},
        fused=True,
    ),
    Case(
        "layer_types",
        config(
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            use_sliding_window=True,
            sliding_window=4,
            norm_topk_prob=True,
            num_experts=7,
            num_experts_per_tok=5,
            head_dim=8,
        ),
        {**SHARED, "the sliding window": no_windows, "renormalised gates": without(routing=dict(renormalise=False))},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_model(case):
    parity.same_model(case)


@pytest.mark.parametrize("case, feature", parity.features(CASES))
def test_feature_counts(case, feature):
    parity.feature_counts(case, feature)

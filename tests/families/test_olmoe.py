"""OLMoE: see `tests/families/parity.py`."""

import pytest

from tests.families import parity
from tests.families.parity import Case, without

transformers = pytest.importorskip("transformers")


def config(**changes):
    sizes = dict(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=10,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_experts=9,
        num_experts_per_tok=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-3,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    return transformers.OlmoeConfig(**{**sizes, **changes})


CASES = [
    Case(
        "released_shape",
        config(),
        {
            "q/k norm": without(attention=dict(qk_norm="none")),
            "gates as they are": without(routing=dict(renormalise=True)),
        },
    ),
    Case(
        "clipped_and_biased",
        config(
            clip_qkv=0.8,
            attention_bias=True,
            num_attention_heads=6,
            num_key_value_heads=2,
            num_experts=7,
            num_experts_per_tok=6,
            tie_word_embeddings=True,
        ),
        {
            "clipped q/k/v": without(attention=dict(clip_qkv=None)),
            "q/k/v bias": without(attention=dict(qkv_bias=False)),
            "output bias": without(attention=dict(out_bias=False)),
        },
        fused=True,
    ),
    Case(
        "renormalised_yarn",
        config(
            norm_topk_prob=True,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_experts=3,
            num_experts_per_tok=1,
            max_position_embeddings=128,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.3,
            },
        ),
        {
            "renormalised gates": without(routing=dict(renormalise=False)),
            "yarn": without(rope=dict(scaling=None)),
            "the attention factor": without(rope=dict(scaling=dict(attention_factor=1.0))),
        },
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_model(case):
    parity.same_model(case)


@pytest.mark.parametrize("case, feature", parity.features(CASES))
def test_feature_counts(case, feature):
    parity.feature_counts(case, feature)

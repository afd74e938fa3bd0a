"""Mixtral: see `tests/families/parity.py`."""

import pytest

from tests.families import parity
from tests.families.parity import Case, no_windows, without

transformers = pytest.importorskip("transformers")


def config(**changes):
    sizes = dict(
        vocab_size=61,
        hidden_size=20,
        intermediate_size=14,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-3,
    )
    return transformers.MixtralConfig(**{**sizes, **changes})


CASES = [
    Case("plain", config(tie_word_embeddings=True), {"renormalised gates": without(routing=dict(renormalise=False))}),
    Case(
        "windowed",
        config(
            sliding_window=7,
            num_attention_heads=6,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
        ),
        {"the sliding window": no_windows, "linear rope": without(rope=dict(scaling=None))},
        fused=True,
    ),
    Case(
        "yarn",
        config(
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=8,
            num_local_experts=9,
            num_experts_per_tok=8,
            max_position_embeddings=128,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 4.0,
            },
        ),
        {
            "yarn": without(rope=dict(scaling=None)),
            "yarn's attention factor": without(rope=dict(scaling=dict(attention_factor=1.0))),
            "yarn's rounded ramp": without(rope=dict(scaling=dict(truncate=False))),
        },
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_model(case):
    parity.same_model(case)


@pytest.mark.parametrize("case, feature", parity.features(CASES))
def test_feature_counts(case, feature):
    parity.feature_counts(case, feature)

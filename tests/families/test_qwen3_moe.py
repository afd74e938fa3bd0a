"""Qwen3-MoE: see `tests/families/parity.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference.compilation import compile_for
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.model.decoder import Stages, committed, device_weights
from tests.families import parity
from tests.families.parity import Case, no_windows, without

transformers = pytest.importorskip("transformers")


def config(**changes):
    sizes = dict(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=22,
        moe_intermediate_size=14,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        num_experts=7,
        num_experts_per_tok=3,
        max_position_embeddings=256,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    return transformers.Qwen3MoeConfig(**{**sizes, **changes})


QK_NORM = {"q/k norm": without(attention=dict(qk_norm="none"))}
CASES = [
    Case(
        "biased_every_other_layer_dense",
        config(attention_bias=True, decoder_sparse_step=2, num_hidden_layers=4, tie_word_embeddings=True),
        {
            **QK_NORM,
            "q/k/v bias": without(attention=dict(qkv_bias=False)),
            "output bias": without(attention=dict(out_bias=False)),
            "gates as they are": without(routing=dict(renormalise=True)),
        },
    ),
    Case(
        "windowed_first_layer_dense",
        config(
            mlp_only_layers=[0],
            use_sliding_window=True,
            sliding_window=6,
            norm_topk_prob=True,
            num_experts=5,
            num_experts_per_tok=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        {
            **QK_NORM,
            "the sliding window": no_windows,
            "llama3 rope": without(rope=dict(scaling=None)),
            "renormalised gates": without(routing=dict(renormalise=False)),
        },
        fused=True,
    ),
    Case(
        "yarn",
        config(
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=8,
            num_experts=11,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            max_position_embeddings=160,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "truncate": False,
            },
        ),
        {
            **QK_NORM,
            "yarn": without(rope=dict(scaling=None)),
            "yarn's unrounded ramp": without(rope=dict(scaling=dict(truncate=True))),
        },
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_model(case):
    parity.same_model(case)


@pytest.mark.parametrize("case, feature", parity.features(CASES))
def test_feature_counts(case, feature):
    parity.feature_counts(case, feature)


@pytest.mark.parametrize("apart, stages", [(False, 7), (True, 8)])
def test_compile_covers_every_kind_of_layer(apart, stages, caplog):
    s = parity.subject(CASES[1])
    engine = Engine(
        Stages(s.architecture, jnp.float32), device_weights(s.dense, jnp.float32), ResidentExperts(s.checkpoint)
    )
    engine.calls.together = 1 if apart else engine.calls.together

    def compiled() -> set[str]:
        text = " ".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        names = ("embed", "dense_layer", "route", "run_experts", "run_chosen", "run_held", "combine", "head")
        return {name for name in names if name in text}

    with jax.log_compiles():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), s.checkpoint.expert_spec)
        compile_for(engine, [5], 3, committed(zeros))
        assert len(compiled()) == stages
        logits, state = engine.prefill([s.prompts[0][:5]], 3)
        for _ in range(3):
            logits = engine.decode(logits.argmax(-1).astype(np.int32), state)
        assert not compiled()

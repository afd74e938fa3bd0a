"""Rotary frequencies at real sizes are those of `transformers`, so that positions far out are rotated alike."""

import numpy as np
import pytest

from moe_jax.checkpoint.config_reader import ConfigReader
from moe_jax.model.rope import frequencies, rope_table

transformers = pytest.importorskip("transformers")
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
CASES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "yarn": YARN,
    "yarn, unrounded": {**YARN, "truncate": False},
    "yarn, deepseek": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 24.0, "beta_slow": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_as_in_transformers(name, head_dim):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    length = 131072
    config = transformers.Qwen3MoeConfig(
        head_dim=head_dim, max_position_embeddings=length, rope_parameters=dict(CASES[name])
    )
    theirs = Qwen3MoeRotaryEmbedding(config)
    ours = ConfigReader({"rope_parameters": CASES[name]}).rope(length)
    found, scale = frequencies(head_dim, ours)
    expected = theirs.inv_freq.numpy()
    assert found.dtype == np.float32
    np.testing.assert_array_max_ulp(found, expected, maxulp=2)
    assert (found == expected).mean() > 0.8  # torch's float32 power is not always rounded correctly
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-9)
    table = rope_table(8, head_dim, ours)
    np.testing.assert_allclose(table[:, 0], scale * np.cos(np.arange(8)[:, None] * expected), atol=2e-6)
    np.testing.assert_allclose(table[:, 1], scale * np.sin(np.arange(8)[:, None] * expected), atol=2e-6)

"""Experts on their own, wherever they live."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model.experts import ExpertWeights, widened
from moe_jax.model.quantized import Int8

rng = np.random.default_rng(0)


def test_widened_is_the_same_expert_in_float32():
    gate_up = jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16)
    down = Int8(jnp.asarray(rng.integers(-127, 128, (4, 4), np.int8)), jnp.ones(4))
    wide = widened(ExpertWeights(gate_up, down, gate_up[:, 0]), jnp.float32)
    assert [x.dtype.name for x in jax.tree.leaves(wide)] == ["float32", "int8", "float32", "float32"]
    np.testing.assert_array_equal(wide.gate_up, np.asarray(gate_up, np.float32))
    np.testing.assert_array_equal(wide.down.values, down.values)

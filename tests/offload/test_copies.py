"""Copies between memories, by either way."""

from typing import Any, cast

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from moe_jax.model.experts import ExpertWeights
from moe_jax.offload import copies

HOST, DEVICE = (SingleDeviceSharding(jax.devices()[0], memory_kind=kind) for kind in ("pinned_host", "device"))


@pytest.mark.parametrize("short", [True, False])
def test_the_same_numbers_in_memory_of_their_own(monkeypatch, short):
    if not short:
        monkeypatch.setattr(copies, "_copy", None)
    assert (copies._copy is not None) == short  # the jax that is pinned has it
    numbers = ExpertWeights(np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((3, 1), np.int8))
    host = jax.device_put(numbers, HOST)
    first, second = copies.to_device(host, DEVICE), copies.to_device(host, DEVICE)
    for made in (first, second):
        assert isinstance(made, ExpertWeights) and made.gate_up_bias is None
        for array, of in zip(jax.tree.leaves(made), jax.tree.leaves(numbers), strict=True):
            assert array.sharding == DEVICE and array.committed and array.dtype == of.dtype
            np.testing.assert_array_equal(array, of)
    put, double = jax.device_put(host, DEVICE), cast(Any, jax.jit(lambda weights: weights.gate_up * 2))
    assert jax.tree.map(jax.typeof, first) == jax.tree.map(jax.typeof, put)
    double(put)
    np.testing.assert_array_equal(double(first), 2 * numbers.gate_up)
    assert double._cache_size() == 1  # nothing is lowered again for them
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((host, first, second))]
    assert len(set(pointers)) == 6
    first.down.delete()
    np.testing.assert_array_equal(host.down, numbers.down)

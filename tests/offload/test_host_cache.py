"""Experts kept in host memory between disk and device, and experts widened on arrival."""

from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.converted import Converted
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.config import OffloadConfig
from moe_jax.errors import UserError
from moe_jax.offload.bank import HostBank
from moe_jax.offload.disk import DiskBank
from moe_jax.offload.host_cache import HostCache
from moe_jax.offload.open import open_source
from moe_jax.offload.widen import WidenedBank, widened_bytes
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "bank"
    convert(HFCheckpoint(write_tiny(tmp_path_factory.mktemp("model"))), directory)
    return Converted(directory)


def load(bank, key):
    """An expert, and the bytes that its load counts."""
    transfer = bank.start(key)
    for index in range(transfer.slices):
        transfer.move(index)
    return transfer.finish(), sum(map(transfer.size, range(transfer.slices)))


def same(checkpoint, key, weights):
    return all(
        np.asarray(x).tobytes() == y.tobytes() for x, y in zip(weights[:2], checkpoint.expert(*key)[:2], strict=True)
    )


def test_what_was_loaded_least_recently_leaves(checkpoint):
    disk = DiskBank(checkpoint)
    cache = HostCache(disk, 2 * disk.expert_bytes + 100)
    reads = []
    for key in [(0, 0), (0, 1), (0, 0), (0, 2), (0, 0), (0, 1)]:
        weights, nbytes = load(cache, key)
        assert same(checkpoint, key, weights)
        reads.append(nbytes // disk.expert_bytes)
    assert reads == [1, 1, 0, 1, 0, 1] and len(cache) == 2


def test_a_device_array_and_what_is_kept_are_apart(checkpoint):
    cache = HostCache(DiskBank(checkpoint), 1 << 20)
    first, second = load(cache, (0, 0))[0], load(cache, (0, 0))[0]
    places = [array.unsafe_buffer_pointer() for array in jax.tree.leaves((first, second))]
    assert len(set(places)) == 4 and cache._kept[0, 0].ctypes.data not in places
    for array in jax.tree.leaves(first):
        array.delete()
    assert same(checkpoint, (0, 0), second) and same(checkpoint, (0, 0), load(cache, (0, 0))[0])


def test_no_room_keeps_nothing(checkpoint):
    cache = HostCache(DiskBank(checkpoint), 100)
    assert [load(cache, (0, 0))[1] > 0 for _ in range(2)] == [True, True] and len(cache) == 0


@pytest.mark.parametrize("narrow", [HostBank, DiskBank])
def test_widened_on_arrival_is_exact_and_counts_the_narrow_bytes(checkpoint, narrow):
    bank = WidenedBank(narrow(checkpoint), checkpoint.expert_spec, jnp.float32)
    weights, nbytes = load(bank, (3, 4))
    expected = checkpoint.expert(3, 4)
    for wide, original in zip(weights[:2], expected[:2], strict=True):
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide, original.astype(np.float32))
    assert bank.expert_bytes == 2 * checkpoint.expert_bytes and nbytes == bank.link_bytes == bank.bank.expert_bytes


def test_quantised_experts_are_not_widened_on_arrival(tmp_path):
    convert(HFCheckpoint(write_tiny(tmp_path / "model")), tmp_path / "int8", quantization="int8")
    with pytest.raises(UserError, match="upcast"):
        widened_bytes(Converted(tmp_path / "int8").expert_spec, jnp.float32)


def opened(checkpoint, host_free, **options):
    """Experts that the device and the host may hold."""
    config = OffloadConfig(**{"tier": "disk", "policy": "lru", **options})
    with closing(open_source(config, checkpoint, jnp.float32, None, host_free)) as source:
        bank: Any = source.bank
        return source.store.capacity, bank.capacity if isinstance(bank, HostCache) else 0


def test_auto_takes_what_the_host_has_left(checkpoint):
    size = DiskBank(checkpoint).expert_bytes
    free = lambda count: lambda: int(count * size / 0.9) + 1
    options = {"device_budget": f"{4 * size}B", "host_budget": "auto"}
    assert opened(checkpoint, free(11), **options) == (4, 7)  # the device is the host
    assert opened(checkpoint, free(10**6), **options) == (4, 35)
    assert opened(checkpoint, free(3), **options) == (4, 0)


@pytest.mark.parametrize("budget", ["50%", "1%", "1MiB"])
def test_a_host_budget_is_for_the_disk_tier(checkpoint, budget):
    with pytest.raises(UserError, match="host_budget is for tier disk"):
        opened(checkpoint, None, tier="host", host_budget=budget)

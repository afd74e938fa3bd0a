"""The host bank: real copies of the right experts in the right kind of memory."""

from typing import Any

import jax
import numpy as np

from moe_jax.offload.bank import HostBank
from tests.offload.rig import BANK, E, FakeCheckpoint, L, check_contents

KEYS = [(layer, expert) for layer in range(L) for expert in range(E)]


def test_every_expert_is_pinned_and_its_copy_is_a_device_array():
    for key in KEYS:
        assert {array.sharding.memory_kind for array in jax.tree.leaves(BANK.get(key))} == {"pinned_host"}
        copied = BANK.copy(key)
        assert {array.sharding.memory_kind for array in jax.tree.leaves(copied)} == {"device"}
        check_contents(key, copied)


def test_copies_are_new_buffers_and_may_be_deleted():
    first, second = BANK.copy((0, 1)), BANK.copy((0, 1))
    assert len({array.unsafe_buffer_pointer() for array in jax.tree.leaves((first, second, BANK.get((0, 1))))}) == 6
    for array in jax.tree.leaves(first):
        array.delete()
    check_contents((0, 1), second)
    check_contents((0, 1), BANK.copy((0, 1)))


def test_sizes_and_dtype_are_those_of_the_checkpoint():
    class Half(FakeCheckpoint):
        def expert(self, layer, expert) -> Any:
            return tuple(part.astype(jax.numpy.bfloat16) for part in super().expert(layer, expert))

    bank = HostBank(Half())
    assert bank.get((0, 0)).gate_up.dtype == jax.numpy.bfloat16
    copied = sum(np.asarray(part).nbytes for part in jax.tree.leaves(bank.copy((1, 1))))
    assert bank.expert_bytes == BANK.expert_bytes // 2 == copied
    assert bank.total_bytes == L * E * bank.expert_bytes


def test_experts_are_read_one_at_a_time():
    alive, most = [], []

    class Part(np.ndarray):  # counts arrays that came from the reader and still exist
        pass

    class Reader(FakeCheckpoint):
        def expert(self, layer, expert) -> Any:
            import weakref

            parts = tuple(part.view(Part) for part in super().expert(layer, expert))
            alive.append(len(parts))
            most.append(sum(alive))
            for part in parts:
                weakref.finalize(part, alive.append, -1)
            return parts

    HostBank(Reader())
    assert max(most) == 2

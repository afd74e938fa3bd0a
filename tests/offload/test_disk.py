"""The disk bank: right bytes in memory of their own, read again only where they must be, and honest about faults."""

import contextlib
import dataclasses
import errno
import gc
import os
import random
import re
import shutil
import threading
from pathlib import Path

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.converted import Converted
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.errors import LoadError
from moe_jax.offload.bank import Transfer
from moe_jax.offload.buffers import ARENA_BYTES, Buffers
from moe_jax.offload.disk import DiskBank
from moe_jax.offload.source import OffloadedExperts
from moe_jax.trace import Trace
from tests.offload.rig import eventually, ready, within
from tests.tiny import TINY, write_tiny

WIDE = dataclasses.replace(TINY, experts=dataclasses.replace(TINY.experts, ff=200))  # 38,400 bytes: ten slices of 4096
KEYS = [(layer, expert) for layer in range(WIDE.num_moe_layers) for expert in range(WIDE.num_experts)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    source = write_tiny(tmp_path_factory.mktemp("model"), WIDE)
    directory = tmp_path_factory.mktemp("converted") / "bank"
    convert(HFCheckpoint(source), directory)
    return directory


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy, to be damaged."""
    return Converted(shutil.copytree(original, tmp_path / "bank"))


def bank_of(checkpoint, slice_bytes=4096, sharers=1):
    return DiskBank(checkpoint, slice_bytes, sharers)


def load(bank, key, order=None):
    transfer: Transfer = bank.start(key)
    for index in order or range(transfer.slices):
        transfer.move(index)
    return transfer.finish()


def same(checkpoint, key, weights):
    expected = checkpoint.expert(*key)
    return all(np.asarray(x).tobytes() == y.tobytes() for x, y in zip(weights[:2], expected[:2], strict=True))


@pytest.mark.parametrize("sharers", [1, 3])
@pytest.mark.parametrize("slice_bytes", [4096, 12288, 1 << 20])
def test_every_expert_whatever_the_order_of_its_slices(original, slice_bytes, sharers):
    checkpoint = Converted(original)
    bank = bank_of(checkpoint, slice_bytes, sharers)
    rng = random.Random(0)
    for key in KEYS:
        transfer = bank.start(key)
        order = list(range(transfer.slices))
        rng.shuffle(order)
        assert sum(map(transfer.size, order)) == bank.link_bytes == bank.expert_bytes
        assert same(checkpoint, key, load(bank, key, order))


@pytest.mark.parametrize(
    ("most", "sharers", "sizes"),
    [
        (40960, 2, [40960]),
        (36864, 1, [20480, 20480]),
        (16384, 1, [16384, 16384, 8192]),
        (16384, 2, [12288, 12288, 12288, 4096]),  # and not three, of which one thread would have two
        (24576, 3, [16384, 16384, 8192]),
    ],
)
def test_slices_are_equal_shares(original, most, sharers, sizes):
    """Of 10 blocks of 4096 bytes: as many slices for each thread, as far as blocks can be divided so."""
    assert bank_of(Converted(original), most, sharers).sizes((0, 0)) == sizes


def test_the_memory_that_was_read_into_is_the_array(original):
    bank, lent = bank_of(Converted(original)), []
    lend = bank.buffers.lend
    bank.buffers.lend = lambda: lent.append(lend()) or lent[-1]
    weights = load(bank, (2, 3))
    start = lent[0].ctypes.data
    assert start % 4096 == 0
    assert [x.unsafe_buffer_pointer() - start for x in weights[:2]] == [0, weights.gate_up.nbytes]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["keep", "drop", "view", "delete"])), max_size=40))
def test_memory_is_lent_again_only_once_every_array_made_of_it_is_gone(original, loads):
    """Also one that a caller sliced, wrapped in numpy, or is still computing with."""
    checkpoint, kept = Converted(original), []
    bank = bank_of(checkpoint, 1 << 20)
    for key, then in loads:
        weights = load(bank, key)
        if then == "keep":
            kept.append((key, weights))
        elif then == "view":
            kept.append((key, [np.asarray(x) for x in weights[:2]]))
        elif then == "delete":
            running = weights.gate_up.astype(np.float32) @ np.ones(weights.gate_up.shape[1], np.float32)
            for array in jax.tree.leaves(weights):
                array.delete()
            running.block_until_ready()
        del weights
    for key, weights in kept:
        assert same(checkpoint, key, weights)


def test_memory_comes_back():
    buffers = Buffers(8192)
    for _ in range(50):
        arrays = [jax.device_put(buffers.lend()[:4096].view(np.float32)) for _ in range(2)]
        jax.block_until_ready([array + 1 for array in arrays])
        del arrays
    gc.collect()
    assert buffers.count <= 4


@pytest.mark.parametrize("nbytes", [8192, 5 << 20, ARENA_BYTES + 4096])
def test_buffers_are_apart_on_pages_and_on_huge_pages_where_there_are_any(nbytes):
    buffers = Buffers(nbytes)
    lent = [buffers.lend() for _ in range(3)]
    for value, memory in enumerate(lent):
        memory[:] = value
    assert [(memory == value).all() for value, memory in enumerate(lent)] == [True] * 3
    addresses = [memory.ctypes.data for memory in lent]
    assert all(len(memory) == nbytes and at % 4096 == 0 for memory, at in zip(lent, addresses, strict=True))
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no transparent huge pages")
    assert all("hg" in flags_of_mapping(at) for at in addresses)


def flags_of_mapping(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            inside = start <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:x}")


class Reads:
    """Stands in front of `os.preadv`: counts calls, and lets chosen ones fail."""

    def __init__(self, monkeypatch, fails=()):
        self.calls, self.fails, self._real = 0, dict(fails), os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, *args):
        self.calls += 1
        if number := self.fails.get(self.calls, self.fails.get("all")):
            raise OSError(number, os.strerror(number))
        return self._real(*args)


def test_a_read_that_fails_once_is_repeated(checkpoint, monkeypatch):
    bank, reads = bank_of(checkpoint), Reads(monkeypatch, {3: errno.EIO})
    assert same(checkpoint, (1, 1), load(bank, (1, 1)))
    assert reads.calls == bank.start((1, 1)).slices + 1


def test_closing_again_closes_no_file_of_others(checkpoint):
    """The system gives a number that is free to whoever opens a file next."""
    bank, before = bank_of(checkpoint), Path(checkpoint.directory, "config.json").read_bytes()
    bank.close()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(Path(checkpoint.directory, "config.json").open("rb")) for _ in range(8)]
        bank.close()
        assert [file.read() for file in files] == [before] * 8


def test_a_read_that_keeps_failing_names_file_layer_and_expert(checkpoint, monkeypatch):
    Reads(monkeypatch, {"all": errno.EIO})
    source = OffloadedExperts(bank_of(checkpoint), WIDE, 3 * 38912, mode="thread", threads=2)
    source.request(1, [4, 5])
    file = checkpoint.expert_location(1, 4).file
    with pytest.raises(LoadError, match=rf"layer 1 expert 4 .*Input/output error.*{file}") as caught:
        within(5, source.take, 1, [4])
    assert "\n" not in str(caught.value)
    within(5, source.close)


def test_a_file_system_without_direct_reads_is_read_through_the_cache(checkpoint, monkeypatch):
    real, flags = os.open, []

    def refuse(path, flag, *args):
        flags.append(flag)
        if flag & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flag, *args)

    monkeypatch.setattr(os, "open", refuse)
    bank = bank_of(checkpoint)
    assert same(checkpoint, (0, 0), load(bank, (0, 0))) and len(flags) > len(bank._files)
    monkeypatch.setattr(os, "open", real)
    bank, reads = bank_of(checkpoint), Reads(monkeypatch, {1: errno.EINVAL})  # some refuse only to read
    assert same(checkpoint, (0, 0), load(bank, (0, 0)))
    assert not bank._files[checkpoint.expert_location(0, 0).file]._direct and reads.calls > 1


def truncated(file):
    os.truncate(file, file.stat().st_size - 4096)


def truncated_to_nothing(file):
    os.truncate(file, 0)


def replaced(file):
    copy = file.with_suffix(".new")
    copy.write_bytes(file.read_bytes())
    os.replace(copy, file)


def removed(file):
    file.unlink()


@pytest.mark.parametrize("change", [truncated, truncated_to_nothing, replaced, removed])
def test_a_bank_that_changes_underneath_is_refused(checkpoint, change):
    bank = bank_of(checkpoint)
    assert same(checkpoint, (1, 0), load(bank, (1, 0)))
    file = checkpoint.expert_location(1, 0).file
    change(file)
    with pytest.raises(OSError, match=f"{file} was {change.__name__.split('_')[0]}"):
        load(bank, (1, 0))
    assert same(checkpoint, (0, 0), load(bank, (0, 0)))  # other files are as they were


class Gated:
    """A bank whose slices wait until the test lets them go; says which have moved."""

    def __init__(self, bank):
        self.bank, self.moved = bank, []
        self.expert_bytes, self.link_bytes = bank.expert_bytes, bank.link_bytes
        self.gate = threading.Semaphore(0)

    def start(self, key):
        transfer = self.bank.start(key)
        move = transfer.move

        def gated(index):
            self.moved.append((key, index))
            assert self.gate.acquire(timeout=5)
            move(index)

        transfer.move = gated
        return transfer

    def close(self):
        self.bank.close()


@pytest.fixture
def gated(original):
    bank = Gated(bank_of(Converted(original), 16384))  # three slices an expert
    source = OffloadedExperts(bank, WIDE, 3 * bank.expert_bytes, mode="thread", threads=2)
    yield bank, source
    bank.gate.release(1000)
    within(5, source.close)


def likely(*rows):
    table = np.zeros((len(rows), WIDE.num_experts), np.float32)
    for row, experts in zip(table, rows, strict=True):
        for expert, probability in experts.items():
            row[expert] = probability
    return table


def test_a_demand_waits_for_one_slice_and_the_speculative_read_is_resumed(gated):
    bank, source = gated
    source.offer(0, likely({2: 0.9}))
    eventually(lambda: bank.moved == [((1, 2), 0)])  # one slice, though there are two threads
    source.request(0, [5])
    bank.gate.release(1)
    eventually(lambda: [key for key, _ in bank.moved[1:]] == [(0, 5), (0, 5)])  # both threads turn to the demand
    bank.gate.release(3)
    assert same(Converted(bank.bank._checkpoint.directory), (0, 5), within(5, source.take, 0, [5])[0])
    eventually(lambda: bank.moved[4:] == [((1, 2), 1)])
    bank.gate.release(2)
    eventually(lambda: (1, 2) in source.store.resident)
    assert sorted(bank.moved) == sorted([((1, 2), i) for i in range(3)] + [((0, 5), i) for i in range(3)])
    source.release(0, [5], ready())
    assert [load.bytes for load in source.trace.loads] == 2 * [bank.link_bytes]


def test_a_layer_that_needs_a_half_read_expert_has_the_rest_read_first(gated):
    bank, source = gated
    source.offer(0, likely({2: 0.9}))
    eventually(lambda: len(bank.moved) == 1)
    assert source.request(1, [3, 2]) == [2, 3] and source.trace.steps()[-1].outcomes == ("missed", "late")
    eventually(lambda: bank.moved[1:] == [((1, 2), 1)])  # at once, beside the first
    bank.gate.release(6)
    within(5, source.take, 1, [2])
    assert bank.moved.count(((1, 2), 0)) == 1


def test_a_half_read_expert_whose_layer_passed_gives_way_and_counts_what_was_read(gated):
    bank, source = gated
    source.offer(0, likely({2: 0.9}))
    eventually(lambda: len(bank.moved) == 1)
    source.request(1, [0, 1])
    bank.gate.release(7)
    within(5, source.take, 1, [0, 1])
    source.release(1, [0, 1], ready())
    assert ((1, 2), 1) not in bank.moved  # not likely any more
    source.offer(1, likely({6: 0.8}))
    eventually(lambda: bank.moved[-1][0] == (2, 6))
    bank.gate.release(3)
    eventually(lambda: (2, 6) in source.store.resident)
    assert [(load.expert, load.bytes) for load in source.trace.loads if load.bytes < bank.link_bytes] == [(2, 16384)]
    wasted = source.trace.summary(decode_only=False)["bytes_per_token"]["speculative_wasted"]
    assert wasted is None or wasted >= 16384


def test_bytes_by_cause_are_what_the_process_has_read(original):
    def read_bytes():
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])

    checkpoint = Converted(original)
    source = OffloadedExperts(bank_of(checkpoint, 1 << 20), WIDE, 4 * 40960, mode="thread", threads=2)
    before, rng = 0, random.Random(1)
    for token in range(-5, 40):
        if token == 0:  # by now all code that this runs has been read from the disk too
            within(5, source._loader.make_room, 4)  # nothing is moving
            source.trace, before = Trace(), read_bytes()
        source.begin_token(token)
        for layer in range(WIDE.num_moe_layers):
            needed = rng.sample(range(WIDE.num_experts), 2)
            source.request(layer, needed)
            within(5, source.take, layer, needed)
            source.release(layer, needed, ready())
            source.offer(layer, likely({rng.randrange(WIDE.num_experts): 0.9}))
    within(5, source._loader.make_room, 4)  # nothing is moving any more
    read = read_bytes() - before
    counted = sum(source.trace.summary()["bytes_per_token"].values()) * 40
    source.close()
    if not read:
        pytest.skip("this file system does not count reads, as tmpfs does not")
    assert counted == pytest.approx(read, rel=0.01)

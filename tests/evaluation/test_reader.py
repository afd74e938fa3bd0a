"""The independent reader: it reads every block as it is, and not again and again into the same memory."""

from __future__ import annotations

import ctypes
import os
import threading

import numpy as np
import pytest

from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.evaluation import reader
from moe_jax.evaluation.reader import DEPTHS, DiskReader, Reading
from tests.tiny import TINY, write_tiny

KEYS = [(layer, expert) for layer in range(TINY.num_moe_layers) for expert in range(TINY.num_experts)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    source = write_tiny(tmp_path_factory.mktemp("model"), TINY)
    return convert(HFCheckpoint(source), tmp_path_factory.mktemp("converted") / "bank")


class Watched:
    """Stands in front of `os.preadv`: keeps the bytes of every read, where they went, and how many ran at once."""

    def __init__(self, monkeypatch, together: int = 1):
        self.bytes, self.places, self._real = [], [], os.preadv
        self._barrier = threading.Barrier(together)
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, handle, views, offset):
        self.places.append(ctypes.addressof(ctypes.c_char.from_buffer(views[0])))
        self._barrier.wait(5)  # so that all of them are under way
        count = self._real(handle, views, offset)
        self.bytes.append(bytes(views[0]))
        return count


def test_every_block_is_read_whole(checkpoint, monkeypatch):
    watched, plain = Watched(monkeypatch), DiskReader(checkpoint)
    for key in KEYS:
        plain.move(key)
    plain.close()
    for key, found in zip(KEYS, watched.bytes, strict=True):
        block = checkpoint.expert_location(*key)
        assert found == np.fromfile(block.file, np.uint8, block.nbytes, offset=block.start).tobytes()


def test_what_is_read_together_has_memory_of_its_own(checkpoint, monkeypatch):
    watched, plain = Watched(monkeypatch, together=DEPTHS[-1]), DiskReader(checkpoint)
    Reading(plain.move, KEYS[: DEPTHS[-1]], DEPTHS[-1]).seconds()
    assert len(set(watched.places)) == DEPTHS[-1]


def test_memory_is_read_into_again_only_after_enough_else(checkpoint, monkeypatch):
    nbytes = checkpoint.expert_location(0, 0).nbytes
    monkeypatch.setattr(reader, "SPREAD_BYTES", 20 * nbytes)
    watched, plain = Watched(monkeypatch), DiskReader(checkpoint)
    for turn in range(60):
        plain.move(KEYS[turn % len(KEYS)])
    assert len(set(watched.places)) == 20
    assert all(watched.places[i] == watched.places[i + 20] for i in range(40))


def test_a_file_that_ends_too_early_is_said(checkpoint, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match=r"ended at byte \d+"):
        Reading(DiskReader(checkpoint).move, KEYS[:4], 2).seconds()

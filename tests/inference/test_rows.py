"""What is appended at every layer of every token is given back, and takes little more memory than it holds."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe_jax
from moe_jax.inference.rows import BLOCK, Lists, Rows
from tests.tiny import TINY, write_tiny

SLICES = st.tuples(*[st.one_of(st.none(), st.integers(-9, 9))] * 2)


@given(lists=st.lists(st.lists(st.integers(-1, 300), max_size=4), max_size=9), at=SLICES)
def test_lists_are_given_back(lists, at):
    found = Lists(lists)
    assert list(found) == lists and len(found) == len(lists) and found[slice(*at)] == lists[slice(*at)]
    assert [found[-1 - i] for i in range(len(lists))] == lists[::-1]
    for beyond in (len(lists), -len(lists) - 1):
        with pytest.raises(IndexError):
            found[beyond]


@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=9), at=SLICES)
def test_rows_are_copied_and_given_back_whatever_their_shapes(sizes, at):
    """A batch may be smaller than the one before."""
    rows = [np.full((n, 2), i, np.int32 if wide else np.int16) for i, (n, wide) in enumerate(sizes)]
    given_rows = [row.copy() for row in rows]
    found = Rows(given_rows)
    for row in given_rows:
        row[:] = -1
    same = lambda a, b: [(x.dtype, x.tolist()) for x in a] == [(x.dtype, x.tolist()) for x in b]
    assert same(found, rows) and same(found[slice(*at)], rows[slice(*at)])


def test_rows_go_on_in_the_next_block():
    found = Rows(np.array([i]) for i in range(2 * BLOCK + 3))
    assert [found[i].item() for i in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 2)] == [0, BLOCK - 1, BLOCK, 2 * BLOCK + 2]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_long_run_keeps_little_of_every_token(tmp_path):
    """Buffers of the device that results live in take thousands of bytes each."""
    checkpoint = str(write_tiny(tmp_path, dataclasses.replace(TINY, eos_ids=())))
    prefetch = {"predictor": "router"}
    model = moe_jax.load(checkpoint, offload={"device_budget": "30%"}, prefetch=prefetch, batch_size=1)
    generation = model.start(["abc"] * 15, 100)
    resident = lambda: int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    sizes = {}
    for row, _ in generation:
        if row not in sizes:
            sizes[row] = resident()
    model.close()
    # Of 100 tokens each; the kernel may make a huge page of small ones once in a while.
    assert np.median(np.diff([*sizes.values()][3:])) / 100 < 1500

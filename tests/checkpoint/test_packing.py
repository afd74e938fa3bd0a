"""Packing changes no bit of a bfloat16 matrix, or refuses it."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.checkpoint import packing
from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.checkpoint.packing import pack, packed_spec, unpack
from moe_jax.errors import UserError
from tests.tiny import TINY, write_tiny


def packed(matrix: np.ndarray):
    # Not zeros: whatever is not written would show.
    into = jax.tree.map(lambda x: np.full(x.shape, 77, x.dtype), packed_spec(*matrix.shape))
    pack(matrix, into)
    return into


def normal(out: int, inputs: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(out, inputs)) * np.exp2(rng.integers(-20, 20, (out, 1)))).astype(ml_dtypes.bfloat16)


def assert_same_bits(matrix: np.ndarray) -> None:
    w = packed(matrix)
    assert not w.places[w.listed == 0].any()  # the same bytes every time
    used = w.listed != 0
    assert (np.argmin(used, axis=1) == used.sum(1)).all()  # a loop stops at the first zero
    got = unpack(w)
    inputs = matrix.shape[1]
    np.testing.assert_array_equal(got[:, :inputs].view(np.uint16), matrix.view(np.uint16))
    assert got.shape[1] == inputs + inputs % 2 and not got[:, inputs:].view(np.uint16).any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 99),
    st.lists(st.tuples(st.integers(0, 1599), st.integers(0, 0xFFFF)), max_size=14),
)
def test_every_bit_comes_back(out, inputs, seed, special):
    """Whatever some of the weights are: zeros of either sign, subnormal, huge, tiny."""
    matrix = normal(out, inputs, seed)
    bits = matrix.view(np.uint16).reshape(-1)
    for place, value in special:
        if value >> 7 & 0xFF != 0xFF:  # NaN and infinity are refused
            bits[place % bits.size] = value
    assert_same_bits(matrix)


@pytest.mark.parametrize("out, inputs", [(96, 50), (20, 51), (7, 300), (1, 9)])
def test_lists_belong_to_chunks_of_outputs(out, inputs, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 600)
    matrix = normal(out, inputs)
    matrix[:, 1] = 1e-30  # listed, in every output
    assert_same_bits(matrix)
    chunks = len(packed(matrix).places)
    assert out % chunks == 0 and (out // chunks * inputs <= 600 or out // chunks % 2)


def test_a_row_of_zeros_and_one_of_a_single_exponent():
    matrix = normal(3, 8)
    matrix[0], matrix[1], matrix[2, :4] = 0, 2.0**-100, -0.0
    assert_same_bits(matrix)
    assert not packed(matrix).listed.any()


def test_twelve_bits():
    """Of a matrix of the usual size; one weight in thousands is listed."""
    w = packed(normal(256, 4096))
    assert 8 * sum(x.nbytes for x in w) / 2**20 < 12.15
    assert 0 < np.count_nonzero(w.listed) < 2**20 / 4000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(value):
    matrix = normal(4, 6)
    matrix[2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        packed(matrix)


def test_exponents_all_over_are_refused():
    bits = np.random.default_rng(0).integers(0, 0x7F00, (64, 64)).astype(np.uint16)
    with pytest.raises(ValueError, match=r"has \d+ of 4096 weights whose exponents"):
        packed(bits.view(ml_dtypes.bfloat16))


def test_a_float32_checkpoint_is_to_be_rounded_first(tmp_path):
    source = HFCheckpoint(write_tiny(tmp_path / "source", TINY, dtype=np.float32))
    with pytest.raises(UserError, match="only bfloat16 can be packed: round it first"):
        convert(source, tmp_path / "packed", "packed")
    rounded = convert(source, tmp_path / "rounded", "bf16")
    done = convert(rounded, tmp_path / "packed_too", "packed")
    want, got = rounded.expert(1, 2), done.expert(1, 2)
    np.testing.assert_array_equal(unpack(got.down)[:, : want.down.shape[1]], want.down)

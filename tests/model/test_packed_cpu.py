"""The loop that multiplies with packed matrices on a CPU: however outputs are shared out, the bits are the same."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.checkpoint import packing
from moe_jax.checkpoint.packing import pack, packed_spec
from moe_jax.model import packed_cpu
from moe_jax.model.packed import Packed


def packed(plain: np.ndarray, chunk: int = 1 << 20) -> Packed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_CHUNK", chunk)
        into = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), packed_spec(*plain.shape))
        pack(plain, into)
    return jax.tree.map(jnp.asarray, into)


def product(x: np.ndarray, w: Packed, parts: int) -> np.ndarray:
    """In so many parts, however small the matrix is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_cpu, "_LARGE", 0)
        patch.setattr(packed_cpu, "_PARTS", parts)
        return np.asarray(packed_cpu.product(jnp.asarray(x), w))


def close(got: np.ndarray, x: np.ndarray, plain: np.ndarray) -> None:
    terms = np.abs(x, dtype=np.float64) @ np.abs(plain.T.astype(np.float64))
    assert (np.abs(got - x.astype(np.float64) @ plain.T.astype(np.float64)) <= 2e-6 * terms + 1e-30).all()


@settings(max_examples=80, deadline=None)
@given(
    out=st.integers(1, 40),
    inputs=st.integers(31, 140),
    rows=st.integers(1, packed_cpu.MOST_ROWS),
    parts=st.integers(1, 9),
    chunk=st.sampled_from([200, 600, 1 << 20]),
    listed=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 139)), max_size=12),
    seed=st.integers(0, 99),
)
def test_is_the_product_with_the_plain_matrix(out, inputs, rows, parts, chunk, listed, seed):
    """Also of weights with exponents of their own, in any output, column, chunk and part, and of zeros."""
    rng = np.random.default_rng(seed)
    plain = (rng.normal(size=(out, inputs)) * np.exp2(rng.integers(-9, 9, (out, 1)))).astype(ml_dtypes.bfloat16)
    plain[rng.integers(out), ::2] = 0
    for output, column in listed:
        plain[output % out, column % inputs] = 2.0**30 * (1 + column)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w = packed(plain, chunk)
    got = product(x, w, parts)
    close(got, x, plain)
    np.testing.assert_array_equal(got, product(x, w, 1))
    np.testing.assert_array_equal(got[-1:], product(x[-1:], w, parts))


def test_as_many_parts_as_threads_need():
    """A matrix of the size of a real one, in a jitted function, beside another."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(2, 3000, 401)).astype(ml_dtypes.bfloat16)
    x = rng.normal(size=(1, 401)).astype(np.float32)
    both = jax.jit(lambda x, a, b: (packed_cpu.product(x, a), packed_cpu.product(x, b)))
    assert plain[0].size >= packed_cpu._LARGE
    lowered = both.lower(x, packed(plain[0]), packed(plain[1])).as_text()
    assert lowered.count("custom_call @moe_jax_packed_product") == 2 * packed_cpu._PARTS > 16
    for got, matrix in zip(both(x, packed(plain[0]), packed(plain[1])), plain, strict=True):
        close(np.asarray(got), x, matrix)


@pytest.mark.parametrize("rows, inputs, suits", [(4, 31, True), (5, 31, False), (1, 30, False)])
def test_suits_few_rows_of_matrices_that_are_wide_enough(rows, inputs, suits):
    x, w = jnp.zeros((rows, inputs)), packed(np.ones((2, inputs), ml_dtypes.bfloat16))
    assert packed_cpu.suits(x, w) == suits

"""The loop that multiplies with packed matrices on a CPU: however outputs are shared out, the bits are the same."""

import itertools

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
    for (output, column), exponent in zip(listed, itertools.cycle([30, -30])):
        plain[output % out, column % inputs] = (-1) ** column * 2.0**exponent * (1 + column)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w = packed(plain, chunk)
    got = product(x, w, parts)
    close(got, x, plain)
    np.testing.assert_array_equal(got, product(x, w, 1))
    np.testing.assert_array_equal(got, np.concatenate([product(row[None], w, parts) for row in x]))
    columns = np.append(rng.integers(0, inputs, 9), [column % inputs for _, column in listed]).astype(int)
    for column in columns:  # each weight by itself: its very bits
        alone = np.eye(inputs, dtype=np.float32)[[column]]
        np.testing.assert_array_equal(product(alone, w, parts)[0], plain[:, column].astype(np.float32))


def test_many_threads_give_the_same_bits():
    """A matrix of the size of a real one, in a jitted function, beside another."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(2, 3000, 401)).astype(ml_dtypes.bfloat16)
    x = rng.normal(size=(1, 401)).astype(np.float32)
    both = jax.jit(lambda x, a, b: (packed_cpu.product(x, a), packed_cpu.product(x, b)))
    weights = [packed(matrix) for matrix in plain]
    calls = both.lower(x, *weights).as_text().count("custom_call @moe_jax_packed_product")
    assert calls == 2 * packed_cpu._PARTS
    for _ in range(20):
        for got, matrix, w in zip(both(x, *weights), plain, weights, strict=True):
            close(np.asarray(got), x, matrix)
            np.testing.assert_array_equal(got, product(x, w, 1))


def test_what_is_not_finite_stays_in_its_columns():
    """17 columns of each half: 15 of the last 16 have been counted already."""
    plain = np.ones((2, 34), ml_dtypes.bfloat16)
    x = np.zeros((1, 34), np.float32)
    x[0, 5] = np.inf
    np.testing.assert_array_equal(product(x, packed(plain), 1), np.full((1, 2), np.inf))


@pytest.mark.parametrize("rows, inputs, suits", [(4, 31, True), (5, 31, False), (1, 30, False)])
def test_suits_few_rows_of_matrices_that_are_wide_enough(rows, inputs, suits):
    x, w = jnp.zeros((rows, inputs)), packed(np.ones((2, inputs), ml_dtypes.bfloat16))
    assert packed_cpu.suits(x, w) == suits

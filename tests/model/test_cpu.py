"""The loops that multiply a few rows on a CPU: however outputs are shared out, the bits are the same."""

import itertools
import os
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.checkpoint import packing
from moe_jax.checkpoint.packing import pack, packed_spec
from moe_jax.model import cpu
from moe_jax.model.packed import Packed, padded
from moe_jax.model.quantized import project

BLOCKS = st.sampled_from([64, 1000, 1 << 17])
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


def packed(plain: np.ndarray, chunk: int = 1 << 20) -> Packed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_CHUNK", chunk)
        into = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), packed_spec(*plain.shape))
        pack(plain, into)
    return jax.tree.map(jnp.asarray, into)


def product(x: np.ndarray, w: Packed | np.ndarray, block: int) -> np.ndarray:
    """In blocks of so many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_BLOCK_BYTES", block)
        rows = jnp.asarray(x)
        return np.asarray(
            cpu.product(padded(rows, w), *w) if isinstance(w, Packed) else cpu.product(rows, jnp.asarray(w))
        )


def close(got: np.ndarray, x: np.ndarray, plain: np.ndarray) -> None:
    terms = np.abs(x, dtype=np.float64) @ np.abs(plain.T.astype(np.float64))
    assert (np.abs(got - x.astype(np.float64) @ plain.T.astype(np.float64)) <= 2e-6 * terms + 1e-30).all()


def check(x: np.ndarray, plain: np.ndarray, w: Packed | np.ndarray, block: int, columns: np.ndarray) -> None:
    """Right, the same in one block and row by row, and of these columns each weight by itself in its very bits."""
    got = product(x, w, block)
    close(got, x, plain)
    np.testing.assert_array_equal(got, product(x, w, 1 << 17))
    np.testing.assert_array_equal(got, np.concatenate([product(row[None], w, block) for row in x]))
    for column in columns:
        alone = np.eye(plain.shape[1], dtype=np.float32)[[column]]
        np.testing.assert_array_equal(product(alone, w, block)[0], plain[:, column].astype(np.float32))


@settings(max_examples=80, deadline=None)
@given(
    out=st.integers(1, 40),
    inputs=st.integers(31, 140),
    rows=st.integers(1, 4),
    block=BLOCKS,
    chunk=st.sampled_from([200, 600, 1 << 20]),
    listed=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 139)), max_size=12),
    seed=st.integers(0, 99),
)
def test_packed_is_the_product_with_the_plain_matrix(out, inputs, rows, block, chunk, listed, seed):
    """Also of weights with exponents of their own, in any output, column, chunk and block, and of zeros."""
    rng = np.random.default_rng(seed)
    plain = (rng.normal(size=(out, inputs)) * np.exp2(rng.integers(-9, 9, (out, 1)))).astype(ml_dtypes.bfloat16)
    plain[rng.integers(out), ::2] = 0
    for (output, column), exponent in zip(listed, itertools.cycle([30, -30])):
        plain[output % out, column % inputs] = (-1) ** column * 2.0**exponent * (1 + column)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    columns = np.append(rng.integers(0, inputs, 9), [column % inputs for _, column in listed]).astype(int)
    check(x, plain, packed(plain, chunk), block, columns)


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    out=st.integers(1, 40),
    inputs=st.integers(1, 200),
    rows=st.integers(1, 16),
    block=BLOCKS,
    seed=st.integers(0, 99),
)
def test_plain_is_the_product(dtype, out, inputs, rows, block, seed):
    rng = np.random.default_rng(seed)
    plain = (rng.normal(size=(out, inputs)) * 50).clip(-127, 127).astype(DTYPES[dtype])
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    check(x, plain, plain, block, np.append(rng.integers(0, inputs, 5), inputs - 1))


def test_many_threads_give_the_same_bits():
    """Matrices of the size of real ones, several in a program, several programs at once."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(2, 3000, 401)).astype(ml_dtypes.bfloat16)
    x = rng.normal(size=(1, 401)).astype(np.float32)
    weights = [packed(plain[0]), plain[1], plain[1].astype(np.float32)]
    want = [product(x, w, 1 << 30) for w in weights]
    for got, matrix in zip(want, [*plain, plain[1]], strict=True):
        close(got, x, matrix)
    every = jax.jit(lambda x, *weights: [project(x, w) for w in weights])
    wrong = []

    def run() -> None:
        for _ in range(100):
            got = jax.block_until_ready(every(x, *weights))
            wrong.extend(i for i, y in enumerate(want) if not np.array_equal(y, got[i]))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_jobs_are_freed():
    """Each is some 170 bytes, which the last of the threads that share it frees."""
    w = jnp.ones((64, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_BLOCK_BYTES", 64)
        loop = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda _, y: cpu.product(y[:, :16], w) / 16, x))
        start = jnp.ones((1, 64))
        jax.block_until_ready(loop(2000, start))
        before = resident_bytes()
        np.testing.assert_array_equal(loop(300000, start), start)
    assert resident_bytes() - before < 16 << 20


@pytest.mark.parametrize("pack", [True, False])
def test_what_is_not_finite_stays_in_its_columns(pack):
    """17 columns of each half: 15 of the last 16 of a packed matrix have been counted already."""
    plain = np.ones((2, 34), ml_dtypes.bfloat16)
    x = np.zeros((1, 34), np.float32)
    x[0, 5] = np.inf
    np.testing.assert_array_equal(product(x, packed(plain) if pack else plain, 64), np.full((1, 2), np.inf))


@pytest.mark.parametrize("rows, inputs, suits", [(4, 31, True), (5, 31, False), (1, 30, False)])
def test_suits_few_rows_of_packed_matrices_that_are_wide_enough(rows, inputs, suits):
    x, w = jnp.zeros((rows, inputs)), packed(np.ones((2, inputs), ml_dtypes.bfloat16))
    assert cpu.suits(x, *w) == suits

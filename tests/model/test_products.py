"""Products of a few rows with stored matrices, against float64; and what a compiled program makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.products import bfloat16_terms, product

rng = np.random.default_rng(0)
ROWS = [1, 2, 3, 8, 32, 130]


def weights(dtype) -> jax.Array:
    if dtype == jnp.int8:
        return jnp.asarray(rng.integers(-127, 128, (48, 96), np.int8))
    return jnp.asarray(rng.normal(size=(48, 96)), dtype)


def exact(x, weight) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_float32_rows_lose_nothing_to_a_narrow_weight(rows, dtype):
    x, weight = jnp.asarray(rng.normal(size=(rows, 96)), jnp.float32), weights(dtype)
    got, want = jax.jit(product)(x, weight), exact(x, weight)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_bfloat16_rows_are_rounded_once(rows, dtype):
    x, weight = jnp.asarray(rng.normal(size=(rows, 96)), jnp.bfloat16), weights(dtype)
    got, want = jax.jit(product)(x, weight), exact(x, weight)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-6 * np.abs(want).max())


def test_three_terms_are_the_number():
    x = rng.normal(size=4096) * 2.0 ** rng.integers(-60, 60, 4096)
    x = jnp.asarray(np.append(x, [0.0, -0.0, 1.0, 2**24 - 1, -1 / 3]), jnp.float32)
    terms = jax.jit(bfloat16_terms)(x)
    assert {term.dtype for term in terms} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(sum(np.asarray(term, np.float64) for term in terms), np.asarray(x, np.float64))


@pytest.mark.parametrize("rows", [1, 8, 128])
def test_no_float32_copy_of_the_matrix_is_made_for_few_rows(rows):
    x, weight = jax.ShapeDtypeStruct((rows, 1024), jnp.float32), jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16)
    memory = jax.jit(product).lower(x, weight).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2048 * 1024 * 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_products_of_one_row_share_nothing_in_memory(dtype):
    x, weight = jax.ShapeDtypeStruct((1, 1024), jnp.float32), jax.ShapeDtypeStruct((2048, 1024), dtype)
    both = jax.jit(lambda x, v, w: (product(x, v), product(x, w)))
    memory = both.lower(x, weight, weight).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2048 * 1024


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-30, 0.0])
def test_a_row_keeps_its_values(value, dtype):
    x = jnp.asarray([[1.0, value, 0.0]], dtype)
    got = jax.jit(product)(x, jnp.ones((2, 3), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.full((1, 2), 1 + x[0, 1], np.float32))


def test_an_accelerator_gets_one_plain_product():
    x, weight = jax.ShapeDtypeStruct((2, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16)
    text = jax.jit(product).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("dot_general") == 1 and "convert" not in text and "reduce" not in text

"""Products with matrices in few bits, against the plain product with the matrix they stand for."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoint import packing
from moe_jax.checkpoint.packing import pack, packed_spec
from moe_jax.model import quantized
from moe_jax.model.packed import Packed
from moe_jax.model.quantized import GROUP, Int4, Int8, Mxfp4, project

rng = np.random.default_rng(0)


def int8(out: int, inputs: int) -> tuple[Int8, np.ndarray]:
    values = rng.integers(-127, 128, (out, inputs), np.int8)
    scale = rng.uniform(0.5, 2, out).astype(np.float32)
    return Int8(jnp.asarray(values), jnp.asarray(scale)), values * scale[:, None]


def int4(out: int, inputs: int) -> tuple[Int4, np.ndarray]:
    """Filled up with whatever comes: the padding must not reach the result."""
    groups = -(-inputs // GROUP)
    nibbles = rng.integers(0, 16, (out, groups, 2, GROUP // 2), np.uint8)
    scale = rng.uniform(0.5, 2, (out, groups)).astype(ml_dtypes.bfloat16)
    packed = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    plain = (nibbles.reshape(out, groups, GROUP).astype(np.float32) - 8) * scale[:, :, None].astype(np.float32)
    return Int4(jnp.asarray(packed.reshape(out, -1)), jnp.asarray(scale)), plain.reshape(out, -1)[:, :inputs]


def mxfp4(out: int, inputs: int) -> tuple[Mxfp4, np.ndarray]:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    nibbles = rng.integers(0, 16, (out, inputs // 32, 16, 2), np.uint8)
    scales = rng.integers(125, 130, (out, inputs // 32), np.uint8)
    packed = nibbles[..., 0] | nibbles[..., 1] << 4
    plain = values[nibbles].reshape(out, -1, 32) * np.exp2(scales.astype(np.float32) - 127)[:, :, None]
    return Mxfp4(jnp.asarray(packed), jnp.asarray(scales)), plain.reshape(out, -1)


def packed(out: int, inputs: int) -> tuple[Packed, np.ndarray]:
    """With zeros, and with weights of two outputs and both halves of the inputs in the list."""
    plain = rng.normal(size=(out, inputs)).astype(ml_dtypes.bfloat16)
    plain[0, ::3], plain[1, 0], plain[-1, -1] = 0, 2.0**30, -(2.0**25)
    into = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), packed_spec(*plain.shape))
    pack(plain, into)
    assert np.count_nonzero(into.listed) >= 2
    return jax.tree.map(jnp.asarray, into), plain.astype(np.float32)


def close(got, x, plain, bias: Any = 0) -> None:
    """Up to rounding of each output's own terms: some are far larger than others."""
    terms = np.abs(x) @ np.abs(plain.T)
    assert (np.abs(got - (x @ plain.T + bias)) <= 5e-6 * terms).all()


@pytest.mark.parametrize("make", [int8, int4, packed])
@pytest.mark.parametrize("inputs", [32, 64, 72, 7, 96])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_is_the_product_with_the_plain_matrix(make, inputs, rows, biased):
    weight, plain = make(10, inputs)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    bias = rng.normal(size=10).astype(np.float32) if biased else None
    close(jax.jit(project)(x, weight, bias), x, plain, 0 if bias is None else bias)


@pytest.mark.parametrize("inputs", [32, 96])
@pytest.mark.parametrize("rows", [1, 8])
def test_is_the_product_with_the_plain_matrix_in_mxfp4(inputs, rows):
    weight, plain = mxfp4(10, inputs)
    x, bias = rng.normal(size=(rows, inputs)).astype(np.float32), rng.normal(size=10).astype(np.float32)
    close(jax.jit(project)(x, weight, bias), x, plain, bias)


def test_the_smallest_scales_of_mxfp4_give_zero_and_no_infinity():
    """Some write scale 0, which is 2^-127, for a block of nothing."""
    weight, _ = mxfp4(4, 32)
    for scale in (0, 1):
        found = jax.jit(project)(np.ones((1, 32), np.float32), weight._replace(scales=weight.scales * 0 + scale), None)
        assert (np.abs(found) <= 32 * 6 * 2.0**-126).all()


@pytest.mark.parametrize("make", [int8, int4, mxfp4, packed])
def test_computes_in_the_dtype_of_the_input(make):
    weight, plain = make(6, 64)
    x = jnp.asarray(rng.normal(size=(2, 64)), jnp.bfloat16)
    got = project(x, weight)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(x, np.float32) @ plain.T
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.03 * np.abs(want).max())


@pytest.mark.parametrize("make", [int8, int4, mxfp4, packed])
@pytest.mark.parametrize("rows", [1, 8, 20])
def test_blocks_of_outputs_are_the_whole(make, rows, monkeypatch):
    monkeypatch.setattr(quantized, "_BLOCK", 3 * 64)
    monkeypatch.setattr(packing, "_CHUNK", 3 * 64)
    weight, plain = make(12, 64)
    x = rng.normal(size=(rows, 64)).astype(np.float32)
    traced = jax.jit(lambda x, weight: project(x, weight))
    close(traced(x, weight), x, plain)
    widened_on_the_way = rows <= {int8: 16, packed: 4}.get(make, 0)
    assert ("while" in traced.lower(x, weight).as_text()) == (not widened_on_the_way)


@pytest.mark.parametrize("rows", [1, 8])
def test_lists_of_several_chunks(rows, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 3 * 66)
    weight, plain = packed(12, 66)  # no shape of other tests: what JAX traced for those, in blocks, it would use again
    assert len(weight.places) == 4
    x = rng.normal(size=(rows, 66)).astype(np.float32)
    close(jax.jit(project)(x, weight), x, plain)


def test_plain_arrays_are_cast():
    weight, x = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((2, 4), jnp.float32)
    got = project(x, weight, jnp.ones(3, jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full((2, 3), 5.0))

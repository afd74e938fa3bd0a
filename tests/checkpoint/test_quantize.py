"""Quantised matrices: within half a step of the original, better than rounding to the nearest, and deterministic."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoint import quantize as module
from moe_jax.checkpoint.quantize import dequantize, quantize, quantized_spec
from moe_jax.model.experts import ExpertWeights
from moe_jax.model.quantized import GROUP, Int4, Int8


def expert(f=40, d=72, seed=0, dtype=ml_dtypes.bfloat16, biased=False) -> Any:
    rng = np.random.default_rng(seed)
    random: Any = lambda *shape: (0.1 * rng.normal(size=shape)).astype(dtype)
    return ExpertWeights(random(2 * f, d), random(d, f), *([random(2 * f), random(d)] if biased else []))


@pytest.mark.parametrize("form", module.FORMATS)
@pytest.mark.parametrize("biased", [False, True])
def test_spec_is_that_of_the_result(form, biased):
    weights = expert(biased=biased)
    spec = quantized_spec(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights), form)
    got = quantize(weights, form)
    assert jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), spec) == jax.tree.map(lambda x: (x.shape, x.dtype), got)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got))
    for bias in ("gate_up_bias", "down_bias"):
        assert getattr(got, bias) is getattr(weights, bias)


def test_none_and_bf16():
    weights = expert(dtype=np.float32)
    assert quantize(weights, "none").gate_up is weights.gate_up
    np.testing.assert_array_equal(quantize(weights, "bf16").down, weights.down.astype(ml_dtypes.bfloat16))
    assert quantize(weights, "bf16").down.dtype == ml_dtypes.bfloat16


def test_int8_is_within_half_a_step():
    w = np.asarray(expert().gate_up, np.float32)
    q = quantize(expert(), "int8").gate_up
    assert isinstance(q, Int8)
    assert (np.abs(q.values).max(1) == 127).all()
    assert (np.abs(dequantize(q) - w) <= 0.5001 * q.scale[:, None]).all()


@pytest.mark.parametrize("d", [32, 72, 7])
def test_int4_is_within_its_steps_and_better_than_rounding(d):
    weights = expert(d=d)
    w = np.asarray(weights.gate_up, np.float32)
    q = quantize(weights, "int4").gate_up
    assert isinstance(q, Int4)
    plain = dequantize(q)
    np.testing.assert_array_equal(plain[:, d:], 0)
    groups = np.pad(w, ((0, 0), (0, -d % GROUP))).reshape(len(w), -1, GROUP)
    step = np.abs(groups).max(-1, keepdims=True) / 7
    nearest = (np.round(groups / step) * step).reshape(len(w), -1)[:, :d]
    ours, rounding = (np.square(x - w).sum() for x in (plain[:, :d], nearest))
    assert ours < 0.75 * rounding
    assert np.abs(plain[:, :d] - w).max() < np.abs(w).max() / 4


def test_int4_nibbles():
    """The layout, by hand: inputs 0 and 16 share the first byte, and the largest weight keeps its sign at -8."""
    row = np.zeros((1, 32), np.float32)
    row[0, [0, 1, 16]] = -0.8, 0.7, 0.3
    q = quantize(ExpertWeights(row, row), "int4").gate_up
    assert q.values[0, 0] & 15 == 0 and q.values[0, 0] >> 4 == 11 and q.values[0, 1] & 15 == 15
    np.testing.assert_allclose(dequantize(q)[0, [0, 1, 16]], [-0.8, 0.7, 0.3], atol=2e-3)
    flipped = quantize(ExpertWeights(-row, -row), "int4").gate_up
    np.testing.assert_array_equal(dequantize(flipped), -dequantize(q))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_zeros_stay_zero(form):
    weights = expert()
    weights.gate_up[3] = 0
    weights.down[:] = 0
    got = quantize(weights, form)
    assert not dequantize(got.gate_up)[3].any() and not dequantize(got.down).any()


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_magnitude(form, scale):
    """bfloat16 and float32 scales have the range of the weights; float16 ones would not."""
    w = expert(dtype=np.float32).gate_up * np.float32(scale)
    got = dequantize(quantize(ExpertWeights(w, w), form).down)[:, : w.shape[1]]
    assert np.abs(got - w).max() < 0.1 * np.abs(w).max()


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_what_is_not_finite(form, bad):
    weights = expert()
    weights.down[5, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weights, form)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_chunks_do_not_show(monkeypatch, form):
    whole = quantize(expert(), form)
    monkeypatch.setattr(module, "_CHUNK", 72 * 7)
    jax.tree.map(np.testing.assert_array_equal, quantize(expert(), form), whole)

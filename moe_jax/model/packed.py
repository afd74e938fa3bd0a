"""bfloat16 matrices in 12 bits a weight, none of them changed, and products with them.

A bfloat16 number is a sign, 8 bits of exponent and 7 of mantissa. Sign and mantissa of trained weights are as good as
random, but the exponents of one output nearly all lie among 15 neighbours: 4 bits say which. The few others are kept
in a list. (Compare DFloat11, arXiv 2504.11651, whose variable-length codes take 11 bits and cannot be read in rows.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.model.primitives import linear


class Packed(NamedTuple):
    """Columns are padded with zeros to an even number 2 h; outputs are in chunks, each with a list of its own."""

    values: jax.Array  # uint8 [out, 2 h]: sign and mantissa
    exponents: jax.Array  # uint8 [out, h]: codes of inputs 0 to h - 1 in the low nibbles, of h to 2 h - 1 in the high
    base: jax.Array  # uint8 [out]: code c > 0 is exponent base + c; 0 is exponent 0, of zeros and subnormal numbers
    listed: jax.Array  # bfloat16 [chunks, n]: weights of other exponents, zero above; then zeros, of unused places
    places: jax.Array  # int32 [chunks, n, 2]: their outputs, counted within the chunk, and their inputs


def product(x: jax.Array, w: Packed) -> jax.Array:
    """`x [R, in]` times the matrix transposed, in x's dtype: `[R, out]`.

    On a CPU it is widened to bfloat16 first, at 2 to 3 weights per nanosecond for any number of rows (2 cores); XLA
    makes nothing faster of it, be sums and widening in one loop or not, over all or over blocks that fit the cache.
    A few rows go through cpu.py instead.
    """
    low, high = _bits(w)
    rows, h = len(low) // len(w.places), low.shape[1]
    output = (jnp.arange(len(w.places))[:, None] * rows + w.places[..., 0]).reshape(-1)
    column, listed = w.places[..., 1].reshape(-1), jax.lax.bitcast_convert_type(w.listed, jnp.uint16).reshape(-1)
    low = low.at[output, jnp.where(column < h, column, h)].add(listed, mode="drop")
    high = high.at[output, jnp.where(column < h, h, column - h)].add(listed, mode="drop")
    low, high = (jax.lax.bitcast_convert_type(half, jnp.bfloat16) for half in (low, high))
    low, high = jax.lax.platform_dependent((low, high), cpu=jax.lax.optimization_barrier, default=lambda pair: pair)
    x = padded(x, w)
    return linear(x[:, :h], low) + linear(x[:, h:], high)


def _bits(w: Packed) -> tuple[jax.Array, jax.Array]:
    """Of bfloat16, uint16 `[out, h]` of the first and of the second half of the inputs; 0 where a weight is listed."""
    h = w.exponents.shape[1]

    def half(values: jax.Array, code: jax.Array) -> jax.Array:
        values, code = values.astype(jnp.uint16), code.astype(jnp.uint16)
        exponent = jnp.where(code > 0, code + w.base[:, None], 0)
        return (values & 0x80) << 8 | exponent << 7 | values & 0x7F

    return half(w.values[:, :h], w.exponents & 15), half(w.values[:, h:], w.exponents >> 4)


def padded(x: jax.Array, w: Packed) -> jax.Array:
    """`x [R, in]` with the columns that the matrix has been padded with."""
    return jnp.pad(x, ((0, 0), (0, w.values.shape[1] - x.shape[1])))

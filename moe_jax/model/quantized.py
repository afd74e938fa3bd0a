"""Matrices in few bits, `[out, in]` like any other, and products with them. Their dtypes and shapes say everything.

They stay as they are on the disk, over the link and in the device store; each product widens them on its way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.model import cpu, packed
from moe_jax.model.packed import Packed
from moe_jax.model.primitives import linear

_BLOCK = 3 << 20  # weights
GROUP = 32
"""Consecutive inputs that share a scale in `Int4`."""


class Int8(NamedTuple):
    """values * scale[:, None]: one scale per output, no zero point."""

    values: jax.Array  # int8 [out, in], -127 to 127
    scale: jax.Array  # float32 [out]


class Int4(NamedTuple):
    """(nibble - 8) * scale: one scale per output and group of 32 inputs, no zero point.

    A group's first 16 inputs are the low nibbles of its 16 bytes, its last 16 the high ones. The last group is filled
    up with zeros where `in` is no multiple of 32.
    """

    values: jax.Array  # uint8 [out, ceil(in / 32) * 16]
    scale: jax.Array  # bfloat16 [out, ceil(in / 32)]


class Mxfp4(NamedTuple):
    """e2m1 * 2^(scale - 127): one scale per output and block of 32 inputs (OCP Microscaling Formats, version 1.0).

    A byte holds two neighbouring inputs, the first in its low nibble: sign, two bits of exponent, one of mantissa.
    """

    blocks: jax.Array  # uint8 [out, in / 32, 16]
    scales: jax.Array  # uint8 [out, in / 32]


Matrix = Any
"""A `jax.Array` (or numpy's), or one of the above; not their union, which whoever knows better would have to narrow."""
MATRICES = {"int8": Int8, "int4": Int4, "mxfp4": Mxfp4, "packed": Packed}
"""By the names that they have in files."""


def project(x: jax.Array, weight: Matrix, bias: jax.Array | None = None) -> jax.Array:
    """`x [R, in]` times `weight [out, in]` transposed, plus `bias [out]`, computed in x's dtype: `[R, out]`."""
    if not isinstance(weight, tuple(MATRICES.values())):
        return linear(x, weight if weight.dtype == jnp.bfloat16 else weight.astype(x.dtype), bias)
    y = jax.lax.platform_dependent(x, weight, cpu=_in_blocks, default=_project)
    return y if bias is None else y + bias.astype(x.dtype)


def _project(x: jax.Array, weight: Any) -> jax.Array:
    if isinstance(weight, Packed):
        return packed.product(x, weight)
    if isinstance(weight, Int8):
        return linear(x, weight.values) * weight.scale.astype(x.dtype)
    if isinstance(weight, Int4):
        return _project_int4(x, weight)
    even, odd = _widened(mxfp4_values(weight, x.dtype))
    pairs = x.reshape(
        len(x), -1, 2
    )  # x[:, ::2] would do, but there are widths that XLA then fails to compile for a GPU
    return linear(pairs[:, :, 0], even) + linear(pairs[:, :, 1], odd)


def _in_blocks(x: jax.Array, weight: Any) -> jax.Array:
    """Blocks of outputs one after the other: what a block is widened to stays in the processor's cache."""
    if isinstance(weight, Packed) and cpu.suits(x, *weight):
        return cpu.product(packed.padded(x, weight), *weight)
    out, blocks = len(weight[0]), 1
    if not (isinstance(weight, Int8) and cpu.suits(x, weight.values)):  # which makes no copy
        while out // blocks * x.shape[1] > _BLOCK and all(len(part) % (2 * blocks) == 0 for part in weight):
            blocks *= 2
    if blocks == 1:
        return _project(x, weight)
    split = jax.tree.map(lambda part: part.reshape(blocks, -1, *part.shape[1:]), weight)
    return jax.lax.map(lambda block: _project(x, block), split).swapaxes(0, 1).reshape(len(x), out)


def _project_int4(x: jax.Array, weight: Int4) -> jax.Array:
    out, half = weight.values.shape[0], GROUP // 2
    scale = weight.scale.astype(x.dtype)[:, :, None]
    groups = scale.shape[1]
    packed = weight.values.reshape(out, groups, half)
    # One product per nibble: putting the halves side by side first costs three times as much on a CPU.
    low, high = (((n.astype(x.dtype) - 8) * scale).reshape(out, -1) for n in (packed & 15, packed >> 4))
    low, high = _widened((low, high))
    x = jnp.pad(x, ((0, 0), (0, groups * GROUP - x.shape[1]))).reshape(-1, groups, 2, half)
    return linear(x[:, :, 0].reshape(len(x), -1), low) + linear(x[:, :, 1].reshape(len(x), -1), high)


def mxfp4_values(weight: Mxfp4, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The weights of even and of odd inputs, each `[out, in / 2]`; exact in bfloat16 and float32 for scales 2 to 252.

    Beyond those the largest values overflow, and a backend may flush the smallest to zero.
    """
    # 2^(scale - 128), as the bits of its exponent: the magnitudes below are doubled. Of scale 0 it is 0, as of 1.
    exponent = jnp.maximum(weight.scales, 1).astype(jnp.uint32) - 1
    scale = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32).astype(dtype)

    def values(nibble: jax.Array) -> jax.Array:
        # Magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6, doubled, are the hexadecimal digits of a table that fits a register.
        doubled = (jnp.uint32(0xC8643210) >> ((nibble & 7) * 4)) & 15
        magnitude = doubled.astype(dtype) * scale[:, :, None]
        return jnp.where(nibble & 8, -magnitude, magnitude).reshape(len(nibble), -1)

    packed = weight.blocks.astype(jnp.uint32)
    return values(packed & 15), values(packed >> 4)


def _widened(matrices):
    """On a CPU a product with a matrix that is widened within it is many times slower than one with a float matrix."""
    return jax.lax.platform_dependent(matrices, cpu=jax.lax.optimization_barrier, default=lambda x: x)

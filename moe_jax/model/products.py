"""Products of a few rows with a matrix that is stored in `[out, in]`, at the speed at which memory gives the matrix.

An accelerator gets a plain `dot_general` and does the rest. On a CPU a token's few rows go through cpu.py. With more of
them XLA's CPU backend (jaxlib 0.10) does well with some forms only, so there the form depends on dtype and number of
rows (both static: which form runs never depends on timing). Weights per nanosecond, 2 cores, matrices of 2304 x 576 to
28672 x 4096 that come from memory:

| rows | float32, dot | bf16, widened, dot | bf16, x in three terms |
|------|--------------|--------------------|------------------------|
| 8    | 1 to 3       | 0.1 to 2           | **2 to 5**             |
| 128  | 0.3 to 0.7   | 0.4                | **0.4 to 0.5**         |
| 512  | 0.19         | **0.14 to 0.19**   | 0.11                   |
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.model import cpu

_MOST_ROWS_IN_TERMS = 128


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [R, in]` times `weight [out, in]` (of x's dtype, bfloat16 or int8) transposed, in x's dtype: `[R, out]`."""
    return jax.lax.platform_dependent(x, weight, cpu=_on_cpu, default=_plain)


def _plain(x: jax.Array, weight: jax.Array, into: Any = None) -> jax.Array:
    weight = weight.astype(x.dtype) if weight.dtype == jnp.int8 else weight
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=into or x.dtype)


def _on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    rows = len(x)
    if cpu.suits(x, weight):
        return cpu.product(x, weight)
    if weight.dtype == jnp.float32:
        return _plain(x, weight)
    if x.dtype == jnp.float32 and rows > _MOST_ROWS_IN_TERMS:
        return _plain(x, jax.lax.optimization_barrier(weight.astype(x.dtype)))
    if weight.dtype == jnp.int8:
        weight = jax.lax.optimization_barrier(weight.astype(jnp.bfloat16))
    if x.dtype == jnp.bfloat16:  # a dot that gives bfloat16 is 3 to 6 times slower
        return _plain(x, weight, jnp.float32).astype(x.dtype)
    # 24 bits of mantissa are three times 8: the products stay exact, and are summed in float32.
    y = _plain(jax.lax.optimization_barrier(jnp.concatenate(bfloat16_terms(x))), weight, jnp.float32)
    return y[:rows] + y[rows : 2 * rows] + y[2 * rows :]


def bfloat16_terms(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three bfloat16 arrays whose sum is float32 x; exactly, unless x is near float32's largest or smallest values."""
    # The compiler may drop a cast to bfloat16 and back, but no `reduce_precision`.
    rounded = lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    high = rounded(x)
    middle = rounded(x - high)
    low = x - high - middle
    return high.astype(jnp.bfloat16), middle.astype(jnp.bfloat16), low.astype(jnp.bfloat16)

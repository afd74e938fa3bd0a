"""What a jitted function owes to the platform that it runs on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_COMPILER = {
    # A GPU's compiler tries kernels and keeps the fastest, which may be another in the next process and rounds
    # otherwise. What it takes untried is as fast: an expert of Mixtral-8x7B on an H100 in 162 us, tried ones in 170.
    "gpu": {"xla_gpu_autotune_level": 0}
}
_ORDERED = {
    # A GPU's threads add up what is scattered to one place, gradients of tables say, in the order in which they come.
    "gpu": {"xla_gpu_deterministic_ops": True}
}


def jitted(function: Callable[..., Any], platform: str, dtype: Any, ordered: bool = False, **options: Any) -> Any:
    """`jax.jit` of a computation in `dtype` that gives the same bits in every process.

    float32 is float32: left alone, a GPU or TPU multiplies with fewer bits of the mantissa.

    Args:
      ordered: it also scatters to places that others scatter to.
    """

    @functools.wraps(function)
    def precise(*args, **kwargs):
        with jax.default_matmul_precision("float32"):
            return function(*args, **kwargs)

    exact = platform != "cpu" and dtype == jnp.float32
    compiler = _COMPILER.get(platform, {}) | (_ORDERED.get(platform, {}) if ordered else {})
    return jax.jit(precise if exact else function, compiler_options=compiler or None, **options)


def reproducible(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jitted` as a decorator, for fits and measurements in float32; the platform is known at the first call."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def compiled() -> Any:
            return jitted(function, jax.default_backend(), jnp.float32, ordered=True, **options)

        @functools.wraps(function)
        def call(*args, **kwargs):
            return compiled()(*args, **kwargs)

        return call

    return decorate


def for_host(x: jax.Array, platform: str) -> jax.Array:
    """Inside jit: a result that the host reads at once. An accelerator writes it into the host's memory itself, which
    on an H100 takes less than half the time of a copy that the host asks for (91 of 272 us with the dispatch)."""
    return x if platform == "cpu" else jax.device_put(x, jax.memory.Space.Host)

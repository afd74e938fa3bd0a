"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the ways in which checkpoints stretch it.

A description (`Rope`) makes a table of cosines and sines once; the stages gather rows of it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
    """Every frequency divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): slow frequencies are interpolated, fast ones kept, a ramp in between."""

    factor: float
    original_length: int
    beta_fast: float = 32.0  # rotations within the original length above which a frequency is kept
    beta_slow: float = 1.0  # ... below which it is divided by `factor`
    truncate: bool = True  # the ramp's ends are rounded outwards to whole dimensions
    attention_factor: float = 1.0  # multiplies cosines and sines


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1 (arXiv 2407.21783): as YaRN in intent, with the ramp over wavelengths."""

    factor: float
    original_length: int
    low_freq_factor: float
    high_freq_factor: float


@dataclasses.dataclass(frozen=True)
class Rope:
    theta: float = 10000.0
    scaling: Linear | Yarn | Llama3 | None = None
    interleaved: bool = False  # pairs are neighbours (x0, x1), not halves (x0, x_{H/2})


def frequencies(dim: int, rope: Rope) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, float32 [dim / 2], and what cosines and sines are multiplied with.

    Rounded where `transformers` rounds: at position 100,000 one unit in the last place is 0.006 radians.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    period = np.power(rope.theta, exponent.astype(np.float64)).astype(np.float32)  # over 2 pi, in positions
    inv_freq = np.float32(1) / period
    match rope.scaling:
        case Linear(factor):
            return inv_freq / np.float32(factor), 1.0
        case Yarn() as yarn:
            ramp = _yarn_ramp(dim, rope.theta, yarn)
            stretched = np.float32(1) / (np.float32(yarn.factor) * period)
            return stretched * ramp + inv_freq * (1 - ramp), yarn.attention_factor
        case Llama3() as llama3:
            return _llama3(inv_freq, llama3), 1.0
    return inv_freq, 1.0


def _yarn_ramp(dim: int, theta: float, s: Yarn) -> np.ndarray:
    """0 where a frequency is kept, 1 where it is divided by the factor: float32 [dim / 2]."""

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns so often within the original length."""
        return dim * math.log(s.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32((high - low) or 0.001)
    return np.float32(1) - (np.float32(1) - np.clip(ramp, 0, 1))


def _llama3(inv_freq: np.ndarray, s: Llama3) -> np.ndarray:
    rotations = np.float32(s.original_length) / (np.float32(2 * math.pi) / inv_freq)  # within the original length
    smooth = (rotations - np.float32(s.low_freq_factor)) / np.float32(s.high_freq_factor - s.low_freq_factor)
    keep = np.clip(smooth, 0, 1)
    return (1 - keep) * inv_freq / np.float32(s.factor) + keep * inv_freq


def rope_table(length: int, dim: int, rope: Rope) -> np.ndarray:
    """Cosines and sines for positions 0..length-1 of a rotated width `dim`: float32 [length, 2, dim / 2].

    Computed once and gathered: XLA would otherwise fuse cos and sin into every element they rotate.
    """
    inv_freq, scale = frequencies(dim, rope)
    angle = np.arange(length, dtype=np.float32)[:, None] * inv_freq
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.float32(scale)


def apply_rope(x: jax.Array, rope: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotates queries or keys.

    Args:
      x: [B, T, heads, H].
      rope: rows of `rope_table` at the tokens' positions, [B or 1, T, 2, H / 2].
      interleaved: pairs are neighbours; they come out as halves, which no product of a query and a key can tell.
    """
    cos, sin = rope[:, :, None, 0], rope[:, :, None, 1]
    x32 = x.astype(jnp.float32)
    x1, x2 = (x32[..., ::2], x32[..., 1::2]) if interleaved else jnp.split(x32, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)

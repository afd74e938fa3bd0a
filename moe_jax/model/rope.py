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


def _yarn(inv_freq: np.ndarray, dim: int, theta: float, s: Yarn) -> np.ndarray:
    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns so often within the original length."""
        return dim * math.log(s.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1)
    return inv_freq / np.float32(s.factor) * ramp + inv_freq * (1 - ramp)


def _llama3(inv_freq: np.ndarray, s: Llama3) -> np.ndarray:
    rotations = s.original_length * inv_freq / (2 * math.pi)  # within the original length
    keep = np.clip((rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return (1 - keep) * inv_freq / np.float32(s.factor) + keep * inv_freq


def rope_table(length: int, dim: int, rope: Rope) -> np.ndarray:
    """Cosines and sines for positions 0..length-1 of a rotated width `dim`: float32 [length, 2, dim / 2].

    Computed once and gathered: XLA would otherwise fuse cos and sin into every element they rotate.
    """
    half = dim // 2
    inv_freq = (1.0 / rope.theta ** (np.arange(half, dtype=np.float32) / np.float32(half))).astype(np.float32)
    scale = np.float32(1)
    match rope.scaling:
        case Linear(factor):
            inv_freq = inv_freq / np.float32(factor)
        case Yarn() as yarn:
            inv_freq, scale = _yarn(inv_freq, dim, rope.theta, yarn), np.float32(yarn.attention_factor)
        case Llama3() as llama3:
            inv_freq = _llama3(inv_freq, llama3)
    angle = np.arange(length, dtype=np.float32)[:, None] * inv_freq.astype(np.float32)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * scale


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

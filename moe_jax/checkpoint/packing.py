"""`Packed` matrices from bfloat16 ones and back, bit for bit, in numpy."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np

from moe_jax.model.packed import Packed

_CODES = 15
_CHUNK = 1 << 20  # weights, at most (if the number of outputs is even often enough)
_SHARE, _SPARE = 1024, 16
"""A chunk of n weights has n / 1024 + 16 places in its list. Of normally distributed weights 1 in 8000 needs one."""


def packed_spec(out: int, inputs: int) -> Packed:
    """Shapes and dtypes of a packed `[out, inputs]`, as `jax.ShapeDtypeStruct`s."""
    spec: Any = jax.ShapeDtypeStruct
    half, chunks = -(-inputs // 2), 1
    while out // chunks * inputs > _CHUNK and out % (2 * chunks) == 0:
        chunks *= 2
    places = out // chunks * inputs // _SHARE + _SPARE
    return Packed(
        spec((out, 2 * half), np.uint8),
        spec((out, half), np.uint8),
        spec((out,), np.uint8),
        spec((chunks, places), ml_dtypes.bfloat16),
        spec((chunks, places, 2), np.int32),
    )


def pack(matrix: np.ndarray, into: Packed) -> None:
    """Packs a bfloat16 `[out, inputs]` into arrays of its `packed_spec`; what a list leaves unused is its end.

    Raises:
      ValueError: a weight is NaN or infinite, or the exponents are spread too widely.
    """
    chunks = len(into.places)
    rows = len(matrix) // chunks
    for c in range(chunks):
        here = slice(c * rows, (c + 1) * rows)
        values, exponents, base = into.values[here], into.exponents[here], into.base[here]
        _pack_chunk(matrix[here].view(np.uint16), values, exponents, base, into.listed[c], into.places[c])


def _pack_chunk(bits: np.ndarray, values, exponents, base, listed, places) -> None:
    rows, inputs = bits.shape
    exponent = (bits >> 7 & 0xFF).astype(np.uint8)
    if (exponent == 0xFF).any():
        raise ValueError("holds a weight that is NaN or infinite")
    keys = (np.arange(rows)[:, None] << 8) + exponent
    upto = np.cumsum(np.bincount(keys.reshape(-1), minlength=rows << 8).reshape(rows, 256), axis=1)
    base[:] = (upto[:, _CODES:] - upto[:, :-_CODES]).argmax(1)  # most weights in base + 1 to base + 15
    code = exponent - base[:, None]  # modulo 256: exponent 0, and what is below the base, are large
    inside = code - 1 < _CODES
    outside = np.flatnonzero(~inside & (exponent > 0))
    if len(outside) > len(places):
        raise ValueError(
            f"has {len(outside)} of {bits.size} weights whose exponents are not among the {_CODES} of their output"
        )
    places[:], listed[:] = 0, 0
    places[: len(outside)] = np.stack(np.divmod(outside, inputs), axis=1)
    listed[: len(outside)] = bits.reshape(-1)[outside].view(ml_dtypes.bfloat16)
    codes = np.zeros((rows, values.shape[1]), np.uint8)
    codes[:, :inputs] = code * inside
    half = exponents.shape[1]
    exponents[:] = codes[:, :half] | codes[:, half:] << 4
    values[:, inputs:] = 0
    values[:, :inputs] = (bits >> 8 & 0x80 | bits & 0x7F) * (inside | (exponent == 0))


def unpack(w: Packed) -> np.ndarray:
    """The bfloat16 matrix, padded with a column of zeros where its width is odd."""
    codes = np.concatenate([w.exponents & 15, w.exponents >> 4], axis=1).astype(np.uint16)
    exponent = np.where(codes > 0, codes + np.asarray(w.base, np.uint16)[:, None], 0)
    values = np.asarray(w.values, np.uint16)
    bits = ((values & 0x80) << 8 | exponent << 7 | values & 0x7F).astype(np.uint16)
    chunk, place = np.nonzero(np.asarray(w.listed, np.float32))
    row, column = np.asarray(w.places)[chunk, place].T
    bits[chunk * (len(bits) // len(w.places)) + row, column] = np.asarray(w.listed)[chunk, place].view(np.uint16)
    return bits.view(ml_dtypes.bfloat16)

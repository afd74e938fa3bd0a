"""Safetensors files read with numpy alone: headers checked against the file, tensors read into given memory.

The `safetensors` package's numpy reader knows no bfloat16 and returns arrays of its own; here a tensor's bytes go from
the page cache straight to where they are wanted, so that a fused array is never copied together from parts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.errors import UserError

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPES = {**FLOATS, "U8": np.dtype(np.uint8), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format


class Tensor(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: str  # safetensors' own name, such as "BF16"; readable when it is in DTYPES
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    nbytes: int
    scales: Tensor | None = None  # it lies in the file in FP8, and is read as what it says; see fp8.py

    def slice(self, index: int) -> Tensor:
        """One slice along the first axis."""
        nbytes = self.nbytes // self.shape[0]
        return Tensor(self.file, self.dtype, self.shape[1:], self.start + index * nbytes, nbytes)

    def rows(self, start: int, end: int) -> Tensor:
        """Some of the first axis."""
        nbytes = self.nbytes // self.shape[0]
        shape = (end - start, *self.shape[1:])
        return Tensor(self.file, self.dtype, shape, self.start + start * nbytes, (end - start) * nbytes)


def read_header(file: Path) -> dict[str, Tensor]:
    """Tensors of one file by name.

    Raises:
      UserError: the file is not safetensors, or its size is not what its header says (an interrupted download).
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(f"{file} is truncated or not a safetensors file; download it again")
        header = f.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(file, 8 + length, entry) for name, entry in entries.items()}
    except _DuplicateError as error:
        raise UserError(f"{file} holds the tensor {error} twice; download it again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} has a damaged safetensors header; download it again") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        dtype = DTYPES.get(tensor.dtype)
        wrong = dtype is not None and tensor.nbytes != math.prod(tensor.shape) * dtype.itemsize
        if tensor.start != end or wrong:
            raise UserError(f"{file} has a damaged safetensors header (at tensor {name}); download it again")
        end += tensor.nbytes
    if size != end:
        state = "truncated" if size < end else "too long"
        raise UserError(f"{file} is {state}: {size} bytes, its header needs {end}; download it again")
    return tensors


def read_into(tensor: Tensor, out: np.ndarray) -> None:
    """Fills `out`, contiguous and of the tensor's size and dtype, with one pass over the file."""
    view = out.reshape(-1).view(np.uint8).data
    with tensor.file.open("rb", buffering=0) as f:
        f.seek(tensor.start)
        while view:
            count = f.readinto(view)  # the kernel gives at most 2 GiB a call
            if not count:
                raise UserError(f"{tensor.file} ended while it was read; download it again")
            view = view[count:]


class _DuplicateError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise _DuplicateError(name)
        seen[name] = value
    return seen


def _tensor(file: Path, data: int, entry: dict[str, Any]) -> Tensor:
    (start, end), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    numbers = (*shape, start, end - start)
    if not isinstance(dtype, str) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(entry)
    return Tensor(file, dtype, shape, data + start, end - start)

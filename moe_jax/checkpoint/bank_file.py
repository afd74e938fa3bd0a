"""Bank files: safetensors that anyone can read, whose blocks can be mapped without a copy and read by O_DIRECT.

    header, padded with spaces | block | block | ...     every block starts at a multiple of 4096
    block: tensor | tensor | ...                         every tensor starts at a multiple of 64

A block is what is read at once: one expert with all its parts, or one dense array. Safetensors allows no holes, so gaps
are filled by tensors of their own, named `_pad.*`. A file has its name only once it is complete and on the disk.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.checkpoint import safetensors_file
from moe_jax.checkpoint.safetensors_file import Tensor

BLOCK_ALIGN, TENSOR_ALIGN = 4096, 64
PAD = "_pad."
PARTIAL = ".partial"
DTYPES = {**safetensors_file.DTYPES, "I8": np.dtype(np.int8), "I32": np.dtype(np.int32)}
"""Dtypes of a bank, by their safetensors names."""

Specs = Mapping[str, jax.ShapeDtypeStruct]
"""Tensors of a block by name, in file order."""


class Block(NamedTuple):
    """Where a block lies; its size, padding included, is a multiple of 4096 bytes."""

    file: Path
    start: int
    nbytes: int
    tensors: dict[str, Tensor]


def nbytes(spec: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def plan(file: Path, blocks: Mapping[str, Specs]) -> tuple[bytes, dict[str, Block]]:
    """Lays out one file before a byte of it is written.

    Returns:
      The header with its length in front, a multiple of 4096 bytes, and the blocks by name. A name that is not a
      `_pad.*` appears in one block only.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}  # dtype, shape, start, end; from the first block on
    ranges: dict[str, tuple[int, int, list[str]]] = {}
    at = 0

    def pad(to: int, block: str) -> None:
        nonlocal at
        if gap := -at % to:
            entries[f"{PAD}{block}.{at}"] = "U8", (gap,), at, at + gap
            at += gap

    for block, specs in blocks.items():
        start = at
        for name, spec in specs.items():
            assert name not in entries and not name.startswith(PAD), name
            pad(TENSOR_ALIGN, block)
            entries[name] = names[np.dtype(spec.dtype)], spec.shape, at, at + nbytes(spec)
            at += nbytes(spec)
        pad(BLOCK_ALIGN, block)
        ranges[block] = start, at - start, list(specs)
    header = json.dumps(
        {name: {"dtype": d, "shape": shape, "data_offsets": (a, b)} for name, (d, shape, a, b) in entries.items()},
        separators=(",", ":"),
    ).encode()
    header += b" " * (-(8 + len(header)) % BLOCK_ALIGN)
    data = 8 + len(header)
    tensor = lambda name: Tensor(
        file, entries[name][0], entries[name][1], data + entries[name][2], entries[name][3] - entries[name][2]
    )
    placed = {
        block: Block(file, data + start, size, {name: tensor(name) for name in inside})
        for block, (start, size, inside) in ranges.items()
    }
    return len(header).to_bytes(8, "little") + header, placed


class BankWriter:
    """Writes one file block by block, in the order of its plan; keeps no data. A context manager.

    Until `finish`, the bytes are in `FILE.partial`.
    """

    def __init__(self, file: Path, blocks: Mapping[str, Specs]):
        """
        Raises:
          OSError: the disk is full, or cannot be written.
        """
        self._path, self._specs = file, blocks
        self._header, self._blocks = plan(file, blocks)
        self._checksums: dict[str, int] = {}
        self._file = open(partial(file), "wb", buffering=0)  # noqa: SIM115  closed by __exit__
        self._at = 0
        try:
            self._put(memoryview(self._header))
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """The next block; arrays by name, of the planned shapes and dtypes.

        Raises:
          OSError: the disk is full, or cannot be written.
        """
        block, checksum = self._blocks[name], 0
        assert self._at == block.start, f"{name} is out of order"
        assert arrays.keys() == block.tensors.keys(), f"{name} has parts {list(arrays)}, not {list(block.tensors)}"
        for part, tensor in block.tensors.items():
            array, spec = arrays[part], self._specs[name][part]
            assert (array.shape, array.dtype) == (spec.shape, spec.dtype), f"{part} is {array.dtype} {array.shape}"
            checksum = self._pad(tensor.start, checksum)
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            checksum = zlib.crc32(data, checksum)
            self._put(data)
        self._checksums[name] = self._pad(block.start + block.nbytes, checksum)

    def finish(self) -> dict[str, int]:
        """Makes the file durable and gives it its name; returns the CRC-32 of every block, padding included."""
        assert self._checksums.keys() == self._blocks.keys(), "not all blocks are written"
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(partial(self._path), self._path)
        sync_directory(self._path.parent)
        return self._checksums

    @property
    def header_checksum(self) -> int:
        """CRC-32 of the header with its length in front."""
        return zlib.crc32(self._header)

    def __enter__(self) -> BankWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def _pad(self, to: int, checksum: int) -> int:
        zeros = bytes(to - self._at)
        self._put(memoryview(zeros))
        return zlib.crc32(zeros, checksum)

    def _put(self, data: memoryview) -> None:
        while data:
            count = self._file.write(data)  # the kernel takes at most 2 GiB a call
            self._at += count
            data = data[count:]


def partial(file: Path) -> Path:
    """Name of a file that is not finished."""
    return file.with_name(file.name + PARTIAL)


def write_durably(file: Path, data: bytes) -> None:
    """Replaces a small file at once: after a crash it is the old one or the new one, never half of it."""
    with open(partial(file), "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial(file), file)
    sync_directory(file.parent)


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

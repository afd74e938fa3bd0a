"""Converts a checkpoint once into our own layout: dense arrays and an expert bank (see `converted.py`).

    open source ─► plan files ─► check the disk ─► dense ─► experts, a file per layer ─► config, index ─► manifest
                                                   └── after each file: fsync, rename, note its checksums in a journal

Killed at any moment, the same call goes on after the last file that was noted, and ends with the same bytes. Once
all is written, it copies what has changed beside the weights. While one block is written the next is read, and
quantised, as far as both fit into two experts and the largest dense array.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from moe_jax.checkpoint.bank_file import (
    BankWriter,
    Specs,
    nbytes,
    partial,
    plan,
    sync_directory,
    write_durably,
)
from moe_jax.checkpoint.converted import (
    DENSE,
    FORMAT,
    JOURNAL,
    MANIFEST,
    Converted,
    dense_block,
    expert_block,
    expert_parts,
    matrix_kind,
)
from moe_jax.checkpoint.hf import INDEX, SINGLE, read_json, reading
from moe_jax.checkpoint.quantize import FORMATS, quantize, quantized_spec
from moe_jax.checkpoint.read_ahead import read_ahead
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import ExpertWeights

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_LARGEST_COPIED = 100_000_000  # bytes; a tokenizer is far smaller
Progress = Callable[[int, int], object]
"""Receives the bytes written so far and in all."""


class Source(Protocol):
    """What is converted; `HFCheckpoint` is one."""

    directory: Path
    architecture: Architecture
    dense_spec: dict[tuple[str | int, ...], jax.ShapeDtypeStruct]
    expert_spec: ExpertWeights

    def dense_array(self, path: tuple[str | int, ...]) -> np.ndarray:
        """One dense array."""
        ...

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """One expert; layers are counted among those that have experts."""
        ...


def convert(
    source: Source, output: str | Path, quantization: str = "none", progress: Progress = lambda done, total: None
) -> Converted:
    """Writes `source` into the directory `output`, or finishes what an earlier call began there.

    If all is finished, what is new or has changed beside the weights (a chat template, say) is copied; none is removed.

    Args:
      quantization: of the experts' matrices: one of `quantize.FORMATS`.

    Raises:
      UserError: `output` is in the way of the source or holds something else, the disk is full, a weight cannot be
        quantised, or the source is damaged.
    """
    if quantization not in FORMATS:
        raise UserError(f"--quantization={quantization!r} is not one of {', '.join(FORMATS)}")
    if quantization != "none" and matrix_kind(source.expert_spec) != "array":
        raise UserError(f"{source.directory} holds quantised experts already; convert it with --quantization=none")
    output = Path(output)
    _check_output(source.directory, output)
    with reading(source.directory):
        job = {"format": FORMAT, "source": fingerprint(source.directory), "quantization": quantization}
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            finished = _begin(output, job)
            if finished is None:
                _renew(source.directory, output)
                return Converted(output)
            return _Conversion(source, output, job, finished, progress).run()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of --output={output} is full; free some space and give the same command again,"
                " which goes on where this one stopped"
            ) from None
        raise UserError(f"--output={output} cannot be written: {error.strerror or error}") from None


def fingerprint(directory: Path) -> str:
    """SHA-256 of what tells one checkpoint from another without reading all of it.

    config.json, and of every weight file its name, size, first 64 kB (the header) and 64 samples of 4 kB.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            digest.update(f.read(65536))
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(4096))
    return digest.hexdigest()


class _Conversion:
    """One run of `convert` on an output that is ours."""

    def __init__(self, source: Source, output: Path, job: dict[str, Any], finished: dict[str, Any], progress: Progress):
        self._source, self._output, self._job, self._finished = source, output, job, finished
        self._form: str = job["quantization"]
        a = source.architecture
        self._dense = {dense_block(path): path for path in source.dense_spec}
        self._spec = quantized_spec(source.expert_spec, self._form)
        self._files: dict[str, dict[str, Specs]] = {
            DENSE: {dense_block(path): {dense_block(path): x} for path, x in source.dense_spec.items()}
        }
        for layer in range(a.num_moe_layers):
            names = [expert_block(a, layer, e) for e in range(a.num_experts)]
            self._files[f"experts-{layer + 1:05}-of-{a.num_moe_layers:05}.safetensors"] = {
                name: {f"{name}.{part}": x for part, x in expert_parts(self._spec).items()} for name in names
            }
        self._experts = {
            expert_block(a, layer, e): (layer, e) for layer in range(a.num_moe_layers) for e in range(a.num_experts)
        }
        self._sizes = {name: _size(output / name, blocks) for name, blocks in self._files.items()}
        self._done, self._progress = 0, progress

    def run(self) -> Converted:
        """Writes what is missing."""
        self._check_space()
        self._write_journal()
        missing = [name for name in self._files if name not in self._finished]
        self._report(sum(self._sizes[name] for name in self._finished))
        with contextlib.closing(self._read([block for name in missing for block in self._files[name]])) as arrays:
            for name in missing:
                self._finished[name] = self._write(name, arrays)
                self._write_journal()
        for file in _small_files(self._source.directory):
            with reading(file):
                data = file.read_bytes()
            write_durably(self._output / file.name, data)
        tensors = {part: name for name, blocks in self._files.items() for parts in blocks.values() for part in parts}
        sizes = [nbytes(x) for blocks in self._files.values() for parts in blocks.values() for x in parts.values()]
        self._save(INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": tensors})
        # From here on it is whole: the manifest says so.
        files = {name: {key: entry[key] for key in ("bytes", "header_crc32")} for name, entry in self._finished.items()}
        blocks = {name: block for entry in self._finished.values() for name, block in entry["blocks"].items()}
        kind = matrix_kind(self._spec)
        self._save(MANIFEST, {**self._job, "matrices": kind, "files": files, "blocks": blocks})
        (self._output / JOURNAL).unlink()
        sync_directory(self._output)
        return Converted(self._output)

    def _write(self, name: str, arrays: Iterator[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Writes one file of the blocks that come next; gives its entry of the manifest."""
        blocks = self._files[name]
        placed = plan(self._output / name, blocks)[1]
        with BankWriter(self._output / name, blocks) as writer:
            self._report(self._sizes[name] - sum(at.nbytes for at in placed.values()))
            for block in blocks:
                writer.write(block, next(arrays))
                self._report(placed[block].nbytes)
            checksums = writer.finish()
            header = writer.header_checksum
        return {
            "bytes": self._sizes[name],
            "header_crc32": f"{header:08x}",
            "blocks": {
                block: {"file": name, "start": at.start, "bytes": at.nbytes, "crc32": f"{checksums[block]:08x}"}
                for block, at in placed.items()
            },
        }

    def _read(self, blocks: list[str]) -> Generator[Mapping[str, np.ndarray]]:
        """The tensors of every block, in this order."""
        dense = {dense_block(path): nbytes(x) for path, x in self._source.dense_spec.items()}
        before, after = (sum(map(nbytes, jax.tree.leaves(x))) for x in (self._source.expert_spec, self._spec))
        needed = before if self._form == "none" else before + after
        return read_ahead(
            blocks,
            self._arrays,
            held=lambda block: dense.get(block, after),
            needed=lambda block: dense.get(block, needed),
            limit=2 * before + max(dense.values()),
        )

    def _arrays(self, block: str) -> Mapping[str, np.ndarray]:
        """The tensors of a block."""
        with reading(self._source.directory):
            if block in self._dense:
                return {block: self._source.dense_array(self._dense[block])}
            weights = self._source.expert(*self._experts[block])
        try:
            weights = quantize(weights, self._form)
        except ValueError as error:
            raise UserError(f"{self._source.directory}: {block} {error}; it cannot be quantised") from None
        return {f"{block}.{part}": array for part, array in expert_parts(weights).items()}

    def _check_space(self) -> None:
        here = (file for name in self._files for file in (self._output / name, partial(self._output / name)))
        present = sum(file.stat().st_size for file in here if file.is_file())
        needed = sum(self._sizes.values()) + sum(f.stat().st_size for f in _small_files(self._source.directory))
        free = shutil.disk_usage(self._output).free
        if needed > free + present:
            raise UserError(
                f"the conversion needs {needed / 1e6:.1f} MB and the disk of --output={self._output} has"
                f" {(free + present) / 1e6:.1f} MB free; choose another disk or a smaller --quantization"
            )

    def _write_journal(self) -> None:
        self._save(JOURNAL, {**self._job, "finished": self._finished})

    def _save(self, name: str, value: dict[str, Any]) -> None:
        write_durably(self._output / name, json.dumps(value, indent=1).encode() + b"\n")

    def _report(self, count: int) -> None:
        self._done += count
        self._progress(self._done, sum(self._sizes.values()))


def _check_output(source: Path, output: Path) -> None:
    inside, outside = output.resolve(), source.resolve()
    if inside == outside or outside in inside.parents:
        raise UserError(f"--output={output} is the checkpoint itself or lies inside it; give another directory")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; give a directory")


def _begin(output: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """Files that an earlier run of the same job finished; None if it finished them all."""
    manifest, journal = read_json(output / MANIFEST), read_json(output / JOURNAL)
    earlier = manifest or journal
    if earlier is None:
        if others := [file.name for file in output.iterdir() if file != partial(output / JOURNAL)]:
            raise UserError(f"--output={output} is not empty ({others[0]}); give a new directory")
        return {}
    if {key: earlier.get(key) for key in job} != job:
        raise UserError(
            f"--output={output} holds another checkpoint, quantization or version; give a new directory or remove it"
        )
    if manifest:
        (output / JOURNAL).unlink(missing_ok=True)  # killed just before this
        return None
    assert journal is not None
    size = lambda name: (output / name).stat().st_size if (output / name).is_file() else None
    return {name: entry for name, entry in journal["finished"].items() if size(name) == entry["bytes"]}


def _renew(source: Path, output: Path) -> None:
    """Copies the small files that a finished conversion lacks or has otherwise."""
    for file in _small_files(source):
        with reading(file):
            data = file.read_bytes()
        there = output / file.name
        if not there.is_file() or there.read_bytes() != data:
            write_durably(there, data)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keeps a second conversion out. The lock goes with the process, however that ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another conversion is writing to --output={directory}; wait for it") from None
    finally:
        os.close(handle)


def _small_files(directory: Path) -> list[Path]:
    """Configuration, tokenizer, chat template, licence: every file but weights and their index."""
    return sorted(
        file
        for file in directory.iterdir()
        if file.is_file()
        and file.suffix not in _WEIGHTS
        and file.name not in (INDEX, SINGLE, MANIFEST, JOURNAL)
        and not file.name.startswith(".")
        and file.stat().st_size <= _LARGEST_COPIED
    )


def _size(file: Path, blocks: Mapping[str, Specs]) -> int:
    header, placed = plan(file, blocks)
    return len(header) + sum(block.nbytes for block in placed.values())

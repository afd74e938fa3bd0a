"""Inflation: a copy of a checkpoint whose experts are as large as one likes and whose text is the original's.

Each expert gets pairs of neurons more whose outputs cancel: two adjacent ones have equal random rows in `gate` and `up`
and opposite random columns in `down`. Routing and text stay real (up to rounding), experts weigh megabytes, no block is
zeros or like another, so that links, disks and caches have real work to do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.checkpoint.bank_file import sync_directory
from moe_jax.checkpoint.convert import Progress, convert, fingerprint
from moe_jax.checkpoint.converted import Converted, open_checkpoint
from moe_jax.checkpoint.families import family
from moe_jax.checkpoint.hf import INDEX, HFCheckpoint, read_json
from moe_jax.checkpoint.names import Rows
from moe_jax.checkpoint.safetensors_file import FLOATS
from moe_jax.errors import UserError
from moe_jax.model.architecture import SwiGLU
from moe_jax.model.experts import ExpertWeights

_WIDTH_FIELDS = ("moe_intermediate_size", "intermediate_size")  # the first that a config.json has is the experts'
_TEXT_FILES = "*token*", "chat_template*", "vocab*", "merges.txt", "generation_config.json"


def cache_folder() -> Path:
    """Where inflated copies go unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe_jax" / "inflated"


def inflated(
    source: str | Path, width: int, folder: str | Path, progress: Progress = lambda done, total: None
) -> tuple[Path, Path]:
    """The inflated copies of `source`, made unless they are in `folder` already.

    Args:
      source: a Hugging Face directory (or a converted one) with plain float SwiGLU experts.
      width: expert hidden width F of the copy, more than the source's by an even number.
      progress: told how many bytes of both are done, and their sum.

    Returns:
      The copy as a Hugging Face directory, and converted (the same bits, as aligned bank files).

    Raises:
      UserError: the model cannot be inflated like this, or the disk does not hold it.
    """
    checkpoint = open_checkpoint(source)
    name = f"{fingerprint(checkpoint.directory)[:16]}-{width}"
    released, bank = Path(folder) / f"{name}-hf", Path(folder) / f"{name}-bank"
    if not (released / "config.json").is_file():
        _Inflation(checkpoint, width).write(released, lambda done, total: progress(done, 2 * total))
    convert(HFCheckpoint(released), bank, progress=lambda done, total: progress(total + done, 2 * total))
    return released, bank


class _Inflation:
    """Writes one inflated copy, expert by expert."""

    def __init__(self, checkpoint: HFCheckpoint | Converted, width: int):
        a = checkpoint.architecture
        extra, plain = width - a.experts.ff, {x.name for x in FLOATS.values()}
        if a.experts.activation != SwiGLU() or a.experts.bias or checkpoint.dtype not in plain:
            raise UserError(f"{checkpoint.directory}: only plain float SwiGLU experts without biases can be inflated")
        if extra < 0 or extra % 2:
            raise UserError(
                f"--inflate={width}: the experts are {a.experts.ff} wide, and neurons are added in pairs;"
                f" give {a.experts.ff} plus an even number"
            )
        self._checkpoint, self._extra = checkpoint, extra
        self._config = read_json(checkpoint.directory / "config.json") or {}
        self._config[next(name for name in _WIDTH_FIELDS if name in self._config)] = width
        self._architecture = dataclasses.replace(a, experts=dataclasses.replace(a.experts, ff=width))
        said = family(self._config).read_config(self._config)
        if dataclasses.replace(said, eos_ids=a.eos_ids) != self._architecture:  # generation_config.json may name others
            raise UserError(f"{checkpoint.directory}: the width of its experts cannot be changed alone")

    def write(self, directory: Path, progress: Progress) -> None:
        """Writes the directory; it has its name only once it is whole."""
        a, checkpoint = self._architecture, self._checkpoint
        names = family(self._config).layouts(a)[0]
        dtype = np.dtype(checkpoint.dtype)
        total = a.num_moe_layers * a.num_experts * 3 * a.d_model * a.experts.ff * dtype.itemsize
        directory.parent.mkdir(parents=True, exist_ok=True)
        if 2 * total > (free := shutil.disk_usage(directory.parent).free):
            raise UserError(
                f"--inflate: two copies of {total / 1e9:.1f} GB are written, and the disk of {directory.parent} has"
                f" {free / 1e9:.1f} GB free; choose a smaller width or another --inflate_folder"
            )
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        shards = self._dense(names.dense), *(self._layer(names.expert, layer) for layer in range(a.num_moe_layers))
        where, done = {}, 0
        for number, shard in enumerate(shards, 1):
            file = partial / f"model-{number:05}-of-{len(shards):05}.safetensors"
            specs, pieces = shard
            with _ShardWriter(file, specs) as writer:
                for name, array in pieces:
                    writer.write(name, array)
                    done += array.nbytes
                    progress(min(done, total), total)
            where |= dict.fromkeys(specs, file.name)
        _save(partial / INDEX, {"metadata": {}, "weight_map": where})
        for pattern in _TEXT_FILES:
            for file in checkpoint.directory.glob(pattern):
                shutil.copyfile(file, partial / file.name)
        _save(partial / "config.json", self._config)
        os.replace(partial, directory)
        sync_directory(directory.parent)

    def _dense(self, arrays: dict[Any, Rows]) -> _Shard:
        spec = self._checkpoint.dense_spec

        def pieces() -> Iterator[tuple[str, np.ndarray]]:
            for path, rows in arrays.items():
                yield from _split(self._checkpoint.dense_array(path), rows)

        return {
            piece.name: (piece.shape, spec[path].dtype) for path, rows in arrays.items() for piece in rows
        }, pieces()

    def _layer(self, expert: Callable[[int, int], dict[str, Rows]], layer: int) -> _Shard:
        a, dtype = self._architecture, np.dtype(self._checkpoint.dtype)
        parts = [expert(layer, e) for e in range(a.num_experts)]
        if any(piece.index is not None or piece.transposed for rows in parts[0].values() for piece in rows):
            raise UserError(f"{self._checkpoint.directory}: experts stored as one tensor per layer cannot be inflated")

        def pieces() -> Iterator[tuple[str, np.ndarray]]:
            for e, rows in enumerate(parts):
                weights = inflate_expert(self._checkpoint.expert(layer, e), self._extra, seed=(layer, e))
                for part in rows:
                    yield from _split(getattr(weights, part), rows[part])

        return {
            piece.name: (piece.shape, dtype) for rows in parts for part in rows.values() for piece in part
        }, pieces()


_Shard = tuple[dict[str, tuple[tuple[int, ...], np.dtype]], Iterator[tuple[str, np.ndarray]]]
"""Shapes and dtypes of a file's tensors by name, and the tensors themselves in that order, made one at a time."""


def inflate_expert(weights: ExpertWeights, extra: int, seed: tuple[int, ...]) -> ExpertWeights:
    """The expert with `extra` more neurons that cancel in pairs, of the spread of its own weights.

    Args:
      weights: numpy, gate_up [2F, D] and down [D, F] in any float dtype.
      seed: of the random neurons: different for every expert.
    """
    gate_up, down = np.asarray(weights.gate_up), np.asarray(weights.down)
    rng, (d, _), pairs = np.random.default_rng(seed), down.shape, extra // 2

    def drawn(like: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        spread = np.asarray(like, np.float32).std()
        return (rng.standard_normal(shape, np.float32) * spread).astype(like.dtype)

    gate, up = np.split(gate_up, 2)
    gate, up = (np.concatenate([x, np.repeat(drawn(gate_up, (pairs, d)), 2, axis=0)]) for x in (gate, up))
    column = drawn(down, (d, pairs))
    opposite = np.stack([column, -column], axis=-1).reshape(d, extra)
    return ExpertWeights(gate_up=np.concatenate([gate, up]), down=np.concatenate([down, opposite], axis=1))


class _ShardWriter:
    """One plain safetensors file, tensor by tensor."""

    def __init__(self, file: Path, specs: dict[str, tuple[tuple[int, ...], np.dtype]]):
        dtypes, at, header = {dtype: name for name, dtype in FLOATS.items()}, 0, {}
        for name, (shape, dtype) in specs.items():
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtypes[dtype], "shape": shape, "data_offsets": (at, end)}
            at = end
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._specs, self._left = specs, list(specs)
        self._file = file.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        assert name == self._left.pop(0) and (array.shape, array.dtype) == self._specs[name], name
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        assert kind or not self._left, "not all tensors are written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _split(array: np.ndarray, rows: Rows) -> Iterator[tuple[str, np.ndarray]]:
    start = 0
    for piece in rows:
        yield piece.name, array[start : start + piece.shape[0]]
        start += piece.shape[0]


def _save(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

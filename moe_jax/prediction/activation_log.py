"""Activations on disk: shards of whole windows, a manifest that says what they are of, resumable shard by shard.

    DIR/manifest.json   schema, model fingerprint, spec, digest of the planned windows, sizes
    DIR/windows.npz     the plan: tokens, lengths, documents
    DIR/shard_00000/    embedding.npy float16 [n, T, D], residual.npy float16 [n, L, T, D], logits.npy float16
                        [n, L, T, E], ids.npy uint16 [n, L, T, K], gates.npy float16 [n, L, T, K], and outputs.npz: of
                        the real tokens routed to each expert the sum of its outputs `sums` float32 [L, E, D] and their
                        number `counts` int64 [L, E]

A shard is written beside its place and renamed when it is complete, so a shard that exists is done. `room` says what
is still to be written, and whether the disk has room for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moe_jax.errors import UserError
from moe_jax.prediction.interface import Spec
from moe_jax.prediction.texts import Windows

SCHEMA = 2
SHARD_WINDOWS = 64
OPEN = 160  # files that a log keeps open: three logs stay within the 1024 that a process may have


class Activations(NamedTuple):
    """Logged arrays of some windows, numpy or traced."""

    embedding: Any  # float16 [W, T, D]: what enters layer 0
    residual: Any  # float16 [W, L, T, D]
    logits: Any  # float16 [W, L, T, E]
    ids: Any  # uint16 [W, L, T, K]: the router's own choice, which rounded logits might not give
    gates: Any  # float16 [W, L, T, K], as the model uses them
    lengths: Any  # int32 [W]
    tokens: Any = None  # int32 [W, T]; `read` gives them, `write` knows them from its windows


ARRAYS = Activations._fields[:-2]
_DTYPES = dict(zip(ARRAYS, (np.float16, np.float16, np.float16, np.uint16, np.float16), strict=True))


class Outputs(NamedTuple):
    """Of the tokens routed to each expert: what the default vectors are made of."""

    sums: np.ndarray  # float [L, E, D]
    counts: np.ndarray  # int64 [L, E]


def half(x: np.ndarray) -> np.ndarray:
    """To float16. Residuals of large models have outliers beyond its range: they are clipped, not made infinite."""
    return np.clip(x, -65504.0, 65504.0).astype(np.float16)


def not_finite(layer: int) -> UserError:
    """That a layer, counted among those with experts, gave no numbers."""
    return UserError(
        f"the activations of MoE layer {layer} are not finite: the checkpoint is damaged, or this --config.dtype does"
        " not suit it; see to that, and log again to another --config.output"
    )


class ActivationLog:
    """A log, complete or not. `missing()` says which shards are still to be written."""

    def __init__(self, directory: str | Path, spec: Spec, model: str, windows: Windows, dtype: str = "float32"):
        """Opens the log of these windows, or starts it.

        Args:
          directory: where it lies.
          spec, model: sizes and fingerprint of the model.
          windows: what is logged.
          dtype: what the model computes in.

        Raises:
          UserError: the directory holds a log of another model, text or dtype, or cannot be written to.
        """
        self.directory, self.windows = Path(directory), windows
        self.shapes, self._spec = (spec.num_layers, windows.tokens.shape[1]), spec
        manifest = {
            "schema": SCHEMA,
            "model": model,
            "spec": dataclasses.asdict(dataclasses.replace(spec, horizon=1)),
            "text": windows.digest(),
            "dtype": dtype,
            "windows": len(windows.tokens),
            "window_tokens": windows.tokens.shape[1],
            "tokens": int(windows.lengths.sum()),
            "shard_windows": SHARD_WINDOWS,
        }
        file = self.directory / "manifest.json"
        if file.exists():
            found = {"dtype": "float32"} | _read(file)  # all that there was before it was written down
            kinds = {"schema": "another version", "model": "another model", "text": "other text"}
            for key, what in (kinds | {"dtype": "a model in another dtype"}).items():
                if found.get(key) != manifest[key]:
                    raise UserError(f"{directory} is an activation log of {what}; delete it or choose another folder")
            if found != manifest:
                raise UserError(f"{file} is damaged; delete {directory}")
        else:
            with _writing(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            with _writing(self.directory / "windows.npz") as plan:
                np.savez(plan, tokens=windows.tokens, lengths=windows.lengths, documents=windows.documents)
            with _writing(file):
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(manifest, indent=1) + "\n")
                os.replace(partial, file)
        self._manifest = manifest
        self._open: dict[tuple[int, str], np.ndarray] = {}

    def identity(self) -> dict[str, str]:
        """What the log is of: fingerprint of the model, digest of the text, dtype of the model."""
        return {key: self._manifest[key] for key in ("model", "text", "dtype")}

    def missing_bytes(self) -> int:
        """About how many bytes the missing shards will take."""
        (L, T), E, D, K = self.shapes, self._spec.num_experts, self._spec.d_model, self._spec.top_k
        window = 2 * T * (D + L * (D + E + 2 * K))
        shard = L * E * (4 * D + 8)
        return sum(len(self.rows(missing)) * window + shard for missing in self.missing())

    def missing(self) -> list[int]:
        """Shards that are not complete."""
        return [shard for shard in range(self._shards()) if not self._path(shard).is_dir()]

    def rows(self, shard: int) -> np.ndarray:
        """Windows of a shard, int [n]."""
        start = shard * SHARD_WINDOWS
        return np.arange(start, min(start + SHARD_WINDOWS, len(self.windows.tokens)))

    def write(self, shard: int, activations: Activations, outputs: Outputs) -> None:
        """Stores one shard: the activations of `rows(shard)`, of any float dtype, and what their experts gave.

        Raises:
          UserError: the disk does not take it. What was stored before stays, and this shard is missing as before.
        """
        expected = (len(self.rows(shard)), *self.shapes)
        partial = self._path(shard).with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._fill(partial, expected, activations, outputs)
            with _writing(self._path(shard)) as place:
                os.rename(partial, place)
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)  # what may be the last room there is
            raise

    def _fill(self, partial: Path, expected: tuple[int, ...], activations: Activations, outputs: Outputs) -> None:
        """The files of a shard of [n, L, T] = `expected`."""
        with _writing(partial):
            partial.mkdir()
        for name in ARRAYS:
            array = getattr(activations, name)
            shape = array.shape[:-1] if array.ndim == 4 else (array.shape[0], self.shapes[0], array.shape[1])
            if shape != expected:
                raise ValueError(f"{name} is {array.shape}, the log wants {expected}")
            with _writing(partial / f"{name}.npy") as file, file.open("wb") as opened:
                small = half(array) if _DTYPES[name] == np.float16 else array.astype(np.uint16)
                np.save(_Plain(opened), small)
        with _writing(partial / "outputs.npz") as file:
            np.savez(file, sums=outputs.sums.astype(np.float32), counts=outputs.counts.astype(np.int64))

    def read(
        self, windows: Sequence[int] | np.ndarray, layer: int | None = None, only: Sequence[str] = ARRAYS
    ) -> Activations:
        """Copies the activations of these windows, in this order, out of the memory-mapped shards.

        Args:
          layer: only this one; the axis of layers is then not there.
          only: names of the arrays that are wanted; the others are None.
        """
        columns: dict[str, np.ndarray] = {}
        for name in only:
            for place, window in enumerate(windows):
                shard, row = divmod(int(window), SHARD_WINDOWS)
                found = self._array(shard, name)[row if layer is None or name == "embedding" else (row, layer)]
                column = columns.setdefault(name, np.empty((len(windows), *found.shape), found.dtype))
                column[place] = found
        chosen = np.asarray(windows)
        arrays = [columns.get(name) for name in ARRAYS]
        return Activations._make([*arrays, self.windows.lengths[chosen], self.windows.tokens[chosen]])

    def _array(self, shard: int, name: str) -> np.ndarray:
        """One file of a shard, memory-mapped; the `OPEN` that were used last stay open."""
        found = self._open.pop((shard, name), None)
        if found is None:
            try:
                found = np.load(self._path(shard) / f"{name}.npy", mmap_mode="r")
            except (OSError, ValueError) as error:
                raise self._unreadable(shard, error) from None
        self._open[shard, name] = found  # the last one
        if len(self._open) > OPEN:
            del self._open[next(iter(self._open))]
        return found

    def outputs(self) -> Outputs:
        """Sums over all shards, float64: the same whatever the order they were written in."""
        total = Outputs(np.zeros((1, 1, 1)), np.zeros((1, 1), np.int64))
        for shard in range(self._shards()):
            try:
                with np.load(self._path(shard) / "outputs.npz") as found:
                    total = Outputs(total.sums + found["sums"].astype(np.float64), total.counts + found["counts"])
            except (OSError, ValueError, KeyError) as error:
                raise self._unreadable(shard, error) from None
        return total

    def _shards(self) -> int:
        return -(-len(self.windows.tokens) // SHARD_WINDOWS)

    def _unreadable(self, shard: int, error: Exception) -> UserError:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):  # what was logged may be whole
            reason, fix = error.strerror or error, "see to that, and give the same command again"
        else:
            reason, fix = error, "delete that folder, and the same command logs it again"
        return UserError(f"shard {self._path(shard)} cannot be read ({reason}); {fix}")

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard_{shard:05d}"


def room(logs: Sequence[ActivationLog]) -> str:
    """What some logs in one folder still have to write, and what the disk has free, as a line for people.

    Raises:
      UserError: they are larger than what is free.
    """
    sizes, folder = {log.directory.name: log.missing_bytes() for log in logs}, logs[0].directory.parent
    free = shutil.disk_usage(folder).free
    if sum(sizes.values()) > free:
        raise UserError(
            f"the log would take {_gigabytes(sum(sizes.values()))}, and {_gigabytes(free)} are free on the disk of"
            f" {folder}; make room, lower --config.max_tokens, or choose another disk with --config.output"
        )
    each = ", ".join(f"{name} {_gigabytes(size)}" for name, size in sizes.items())
    return f"log: {_gigabytes(sum(sizes.values()))} to write ({each}), {_gigabytes(free)} free in {folder}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


class _Plain:
    """A file that NumPy only writes to: its own way around Python loses the end of an array where the disk is full."""

    def __init__(self, file: BinaryIO):
        self.write = file.write


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[Path]:
    """Gives the file back; that the disk does not take it is the user's to know, in one line."""
    try:
        yield file
    except OSError as error:
        raise UserError(
            f"{file}: the log cannot be written there ({error.strerror or error}); make room, or choose another disk"
            " with --config.output: the same command then goes on where it stopped"
        ) from None


def _read(file: Path) -> dict:
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged; delete {file.parent}")
    return found

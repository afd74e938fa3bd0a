"""A Hugging Face directory: everything about it is checked when it is opened, tensors are read when asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint import fp8
from moe_jax.checkpoint.families import family
from moe_jax.checkpoint.names import EMBEDDING, HEAD, Names, Rows, expert_weights
from moe_jax.checkpoint.safetensors_file import DTYPES, FLOATS, Tensor, read_header, read_into
from moe_jax.errors import UserError
from moe_jax.memory import empty
from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import ExpertWeights

_STRIP = 256  # rows of a matrix that is transposed, read at once
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HFCheckpoint:
    """A checkpoint in Hugging Face format, in one safetensors file or in shards with an index.

    Reading is thread-safe and keeps nothing: every call goes to the file and gives a new array.

    Attributes:
      directory: where it lies.
      architecture: read from config.json, end tokens from generation_config.json where it names them.
      dtype: of the experts' matrices: "bfloat16", "float16", "float32" or "mxfp4".
      dense_spec: shapes and dtypes of the dense arrays, by path.
      expert_spec: shapes and dtypes of one expert, `ExpertWeights` of `jax.ShapeDtypeStruct`.
      expert_bytes: bytes of one expert as stored.
    """

    def __init__(self, directory: str | Path):
        """Reads config.json and all headers, no weights.

        Raises:
          UserError: something is missing, unexpected, truncated, of the wrong shape or dtype, or not supported.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            problem = "is not a directory" if self.directory.exists() else "does not exist"
            raise UserError(f"checkpoint {directory} {problem}; give a Hugging Face model directory")
        config = read_json(self.directory / "config.json")
        if config is None:
            raise UserError(f"{directory} has no config.json; give a Hugging Face model directory")
        chosen = family(config)
        self.architecture = a = with_generation_config(chosen.read_config(config), self.directory)
        self._tensors = _tensors(self.directory)
        quantization = config.get("quantization_config") or {}
        self._block = fp8.block_of(quantization) if quantization.get("quant_method") == "fp8" else None
        if self._block:
            self._tensors = fp8.with_scales(self._tensors, self._block)
        if a.tie_embeddings:
            self._drop_copied_head()
        self._names = self._closest(chosen.layouts(a))
        experts = [self._names.expert(layer, e) for layer in range(a.num_moe_layers) for e in range(a.num_experts)]
        self._check([*self._names.dense.values(), *(rows for parts in experts for rows in parts.values())])
        self.dense_spec = {
            path: jax.ShapeDtypeStruct(_shape(rows), self._one_dtype([piece.name for piece in rows]))
            for path, rows in self._names.dense.items()
        }
        dtypes = {
            part: self._one_dtype(list(dict.fromkeys(piece.name for parts in experts for piece in parts[part])))
            for part in experts[0]
        }
        self.dtype = dtypes["gate_up"].name if "gate_up" in dtypes else "mxfp4"
        self.expert_spec = expert_weights(
            {part: jax.ShapeDtypeStruct(_shape(rows), dtypes[part]) for part, rows in experts[0].items()}
        )
        self.expert_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.expert_spec))

    def dense(self) -> dict[str, Any]:
        """All dense weights in checkpoint dtype: numpy arrays in the tree of `nnx.to_pure_dict` of `layers.Decoder`."""
        tree: dict[Any, Any] = {}
        for path in self.dense_spec:
            node = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = self.dense_array(path)
        return tree

    def dense_array(self, path: tuple[str | int, ...]) -> np.ndarray:
        """One dense array in checkpoint dtype."""
        return self._read(self._names.dense[path])

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """One expert as numpy arrays in checkpoint dtype; layers are counted among those that have experts."""
        return expert_weights({part: self._read(rows) for part, rows in self._names.expert(layer, expert).items()})

    def _read(self, rows: Rows) -> np.ndarray:
        """Reads pieces stacked along rows, each straight into its place."""
        out = empty(_shape(rows), DTYPES[self._tensors[rows[0].name].dtype])
        start = 0
        for piece in rows:
            tensor, count = self._tensors[piece.name], _shape((piece,))[0]
            tensor = tensor if piece.index is None else tensor.slice(piece.index)
            place = out[start : start + count]
            if piece.transposed:
                for at in range(0, tensor.shape[0], _STRIP):  # a second copy of all of it would be large
                    strip = tensor.rows(at, min(at + _STRIP, tensor.shape[0]))
                    stored = empty(strip.shape, out.dtype)
                    read_into(strip, stored)
                    place[:, at : at + _STRIP] = stored.T
            elif self._block and tensor.scales:
                fp8.read_widened(tensor, self._block, place)
            else:
                read_into(tensor, place)
            start += count
        return out

    def _closest(self, layouts: tuple[Names, ...]) -> Names:
        """The layout that has most of its expert tensors here; the first on ties."""

        def found(names: Names) -> bool:
            return all(piece.name in self._tensors for rows in names.expert(0, 0).values() for piece in rows)

        return next(filter(found, layouts), layouts[0])

    def _drop_copied_head(self) -> None:
        """Some files hold the output head although it is the embedding."""
        head, embedding = self._tensors.get(HEAD), self._tensors.get(EMBEDDING)
        if head is None or embedding is None:
            return
        same = head.shape == embedding.shape and head.dtype == embedding.dtype and head.dtype in DTYPES
        for at in range(0, head.shape[0] if same else 0, _STRIP):
            parts = [tensor.rows(at, min(at + _STRIP, head.shape[0])) for tensor in (head, embedding)]
            stored = [empty(part.shape, DTYPES[part.dtype]) for part in parts]
            for part, out in zip(parts, stored, strict=True):
                read_into(part, out)
            if stored[0].tobytes() != stored[1].tobytes():
                same = False
                break
        if not same:
            raise UserError(
                f"checkpoint {self.directory} has an {HEAD} that is not the embedding, to which config.json ties it;"
                " give tie_word_embeddings false there if it is meant"
            )
        del self._tensors[HEAD]

    def _check(self, arrays: Iterable[Rows]) -> None:
        expected = {piece.name: piece for rows in arrays for piece in rows}
        if missing := [name for name in expected if name not in self._tensors]:
            raise UserError(f"checkpoint {self.directory} lacks {_some(missing)}; download it again")
        unread = set().union(*(group for group in self._names.unread if group <= self._tensors.keys()))
        known = lambda name: name in expected or name in unread or self._names.ignored(name)
        if extra := [name for name in self._tensors if not known(name)]:
            raise UserError(
                f"checkpoint {self.directory} has unexpected {_some(extra)}; config.json describes another model"
            )
        wrong = {name: (self._tensors[name].shape, piece.shape) for name, piece in expected.items()}
        if wrong := [f"{n} is {list(got)}, not {list(want)}" for n, (got, want) in wrong.items() if got != want]:
            raise UserError(
                f"checkpoint {self.directory} has wrong shapes: {_some(wrong, '')}; config.json describes another model"
            )
        for wanted in dict.fromkeys(piece.dtype for piece in expected.values()):
            supported = FLOATS if wanted is None else (wanted,)
            found = {name: self._tensors[name].dtype for name, piece in expected.items() if piece.dtype == wanted}
            if odd := [f"{name} is {dtype}" for name, dtype in found.items() if dtype not in supported]:
                raise UserError(f"{self.directory}: {_some(odd, '')}; supported dtypes: {', '.join(supported)}")

    def _dtype(self, name: str) -> np.dtype | None:
        return DTYPES.get(self._tensors[name].dtype)

    def _one_dtype(self, names: list[str]) -> np.dtype:
        first, *rest = names
        dtype = DTYPES[self._tensors[first].dtype]
        other = [name for name in rest if self._dtype(name) != dtype]
        if other:
            raise UserError(
                f"checkpoint {self.directory} mixes dtypes: {first} is {self._tensors[first].dtype},"
                f" {other[0]} is {self._tensors[other[0]].dtype}; save it in one dtype"
            )
        return dtype


def _shape(rows: Rows) -> tuple[int, ...]:
    """Shape of the array that the pieces make."""
    shapes = [piece.shape if piece.index is None else piece.shape[1:] for piece in rows]
    shapes = [shape[::-1] if piece.transposed else shape for piece, shape in zip(rows, shapes, strict=True)]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@contextlib.contextmanager
def reading(place: Path) -> Iterator[None]:
    """While this lasts `place` is read, a file or folder. Raises UserError where the system refuses to."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or place} cannot be read: {error.strerror or error}") from None


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in `file`, or None when there is no such file.

    Raises:
      UserError: the file holds something else, or cannot be read.
    """
    try:
        with reading(file):
            if not file.is_file():
                return None
            value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object; download it again")
    return value


def with_generation_config(a: Architecture, directory: Path) -> Architecture:
    """The architecture with the end tokens of generation_config.json, which beat those of config.json where they are
    given, as in `transformers` (chat models add the end of a turn there).

    Raises:
      UserError: they are not ids.
    """
    eos = (read_json(directory / "generation_config.json") or {}).get("eos_token_id")
    if eos is None:
        return a
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < a.vocab_size for x in ids):
        raise UserError(
            f"{directory / 'generation_config.json'} has eos_token_id={eos!r}; it must be a token id or a list of them"
        )
    return dataclasses.replace(a, eos_ids=ids)


def _tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, from its single file or from the shards of its index."""
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    index = read_json(directory / INDEX)
    if index is None:
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{directory / INDEX} has no weight_map from tensor to file; download it again")
    files = sorted(set(weight_map.values()))
    if absent := [file for file in files if not (directory / file).is_file()]:
        raise UserError(f"{directory} lacks {_some(absent, 'file')}, which {INDEX} names; download it again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(directory / file).items():
            if name in tensors:
                raise UserError(f"{directory} holds tensor {name} twice, in {tensors[name].file.name} and {file}")
            tensors[name] = tensor
    elsewhere = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    if elsewhere:
        raise UserError(f"{directory / INDEX} and its shards disagree about {_some(elsewhere)}; download it again")
    return tensors


def _some(names: list[str], noun: str = "tensor") -> str:
    """The first five names, and how many there are."""
    plural = f"{len(names)} {noun}s " if noun and len(names) > 1 else f"{noun} " if noun else ""
    return plural + ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")

"""A Hugging Face directory: everything about it is checked when it is opened, tensors are read when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.checkpoint import mixtral
from moe_jax.checkpoint.safetensors_file import DTYPES, Tensor, empty, read_header, read_into
from moe_jax.errors import UserError
from moe_jax.model.architecture import from_hf_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HFCheckpoint:
    """A Mixtral checkpoint in Hugging Face format, in one safetensors file or in shards with an index.

    Reading is thread-safe and keeps nothing: every call goes to the file and gives a new array.

    Attributes:
      directory: where it lies.
      architecture: read from config.json.
      dtype: dtype of the experts: "bfloat16", "float16" or "float32".
      expert_bytes: bytes of one expert in that dtype.
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
        self.architecture = a = from_hf_config(config)
        self._tensors = _tensors(self.directory)
        self._dense = mixtral.dense(a)
        experts = [mixtral.expert(a, layer, e) for layer in range(a.num_layers) for e in range(a.num_experts)]
        expert_rows = [rows for parts in experts for rows in parts]
        self._check([*self._dense.values(), *expert_rows])
        name, dtype = self._one_dtype(name for rows in expert_rows for name in rows)
        for rows in self._dense.values():
            self._one_dtype(rows)
        self.dtype = dtype.name
        self.expert_bytes = a.expert_params() * dtype.itemsize

    def dense(self) -> dict[str, Any]:
        """All dense weights in checkpoint dtype: numpy arrays in the tree of `nnx.to_pure_dict` of `layers.Decoder`."""
        tree: dict[Any, Any] = {}
        for path, rows in self._dense.items():
            node = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = self._read(rows)
        return tree

    def expert(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """One expert in checkpoint dtype: gate_up [2F, D], gate rows then up rows, and down [D, F]."""
        gate_up, down = mixtral.expert(self.architecture, layer, expert)
        return self._read(gate_up), self._read(down)

    def _read(self, rows: mixtral.Rows) -> np.ndarray:
        """Reads tensors stacked along rows, each straight into its place."""
        shapes = list(rows.values())
        dtype = DTYPES[self._tensors[next(iter(rows))].dtype]
        out = empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype)
        start = 0
        for name, shape in rows.items():
            read_into(self._tensors[name], out[start : start + shape[0]])
            start += shape[0]
        return out

    def _check(self, arrays: Iterable[mixtral.Rows]) -> None:
        expected = {name: shape for rows in arrays for name, shape in rows.items()}
        if missing := [name for name in expected if name not in self._tensors]:
            raise UserError(f"checkpoint {self.directory} lacks {_some(missing)}; download it again")
        if extra := [name for name in self._tensors if name not in expected]:
            raise UserError(
                f"checkpoint {self.directory} has unexpected {_some(extra)}; config.json describes another model"
            )
        wrong = {name: (self._tensors[name].shape, shape) for name, shape in expected.items()}
        if wrong := [f"{n} is {list(got)}, not {list(want)}" for n, (got, want) in wrong.items() if got != want]:
            raise UserError(
                f"checkpoint {self.directory} has wrong shapes: {_some(wrong, '')}; config.json describes another model"
            )
        if odd := [f"{name} is {self._tensors[name].dtype}" for name in expected if self._dtype(name) is None]:
            raise UserError(f"{self.directory}: {_some(odd, '')}; supported dtypes: {', '.join(DTYPES)}")

    def _dtype(self, name: str) -> np.dtype | None:
        return DTYPES.get(self._tensors[name].dtype)

    def _one_dtype(self, names: Iterable[str]) -> tuple[str, np.dtype]:
        first, *rest = names
        other = [name for name in rest if self._dtype(name) != self._dtype(first)]
        if other:
            raise UserError(
                f"checkpoint {self.directory} mixes dtypes: {first} is {self._tensors[first].dtype},"
                f" {other[0]} is {self._tensors[other[0]].dtype}; save it in one dtype"
            )
        return first, DTYPES[self._tensors[first].dtype]


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in `file`, or None when there is no such file.

    Raises:
      UserError: the file holds something else.
    """
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object; download it again")
    return value


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

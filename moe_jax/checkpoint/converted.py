"""A directory that `convert.py` wrote: every block is checked against its checksum when it is read here.

(Tier "disk" reads blocks by itself, over and over, and watches the files instead: a checksum takes longer than a read.)

    DIR/manifest.json                    written last: without it, a directory is no finished conversion
    DIR/config.json, tokenizer.json ...  as in the source
    DIR/dense.safetensors                one block per dense array
    DIR/experts-00001-of-0000N.safetensors   one file per layer with experts, one block per expert
    DIR/model.safetensors.index.json     which tensor is in which file

See `bank_file.py` for the files.
"""

from __future__ import annotations

import mmap
import zlib
from io import FileIO
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint.bank_file import DTYPES, PAD, Block
from moe_jax.checkpoint.families import family
from moe_jax.checkpoint.hf import HFCheckpoint, read_json, reading, with_generation_config
from moe_jax.checkpoint.names import expert_weights
from moe_jax.checkpoint.safetensors_file import Tensor, read_header
from moe_jax.errors import UserError
from moe_jax.memory import empty
from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import ExpertWeights
from moe_jax.model.quantized import MATRICES

MANIFEST, JOURNAL = "manifest.json", "conversion.json"
FORMAT = "moe_jax bank 1"
DENSE = "dense.safetensors"
REDO = "convert the checkpoint again"


def open_checkpoint(directory: str | Path) -> HFCheckpoint | Converted:
    """A Hugging Face directory or a converted one.

    Raises:
      UserError: it is neither, it is damaged, it cannot be read, or its conversion was interrupted.
    """
    directory = Path(directory)
    with reading(directory):
        if (directory / MANIFEST).is_file():
            return Converted(directory)
        if (directory / JOURNAL).is_file():
            raise UserError(f"the conversion into {directory} was interrupted; give the same convert.py command again")
        return HFCheckpoint(directory)


def expert_block(a: Architecture, layer: int, expert: int) -> str:
    """Name of an expert's block; the file counts all layers, the argument those that have experts."""
    return f"layers.{a.moe_layers[layer]}.experts.{expert}"


def dense_block(path: tuple[str | int, ...]) -> str:
    """Name of a dense array's block and tensor."""
    return ".".join(["dense", *map(str, path)])


def expert_parts(weights: ExpertWeights) -> dict[str, Any]:
    """The arrays (or specs) of one expert by dotted name; inverse of `names.expert_weights`."""
    leaves, _ = jax.tree.flatten_with_path(weights)
    return {".".join(key.name for key in path): leaf for path, leaf in leaves}


def matrix_kind(weights: ExpertWeights) -> str:
    """What an expert's matrices are, for the manifest: a key of `MATRICES`, or "array"."""
    return next((kind for kind, matrix in MATRICES.items() if isinstance(weights.gate_up, matrix)), "array")


class Converted:
    """A converted checkpoint, with the interface of `HFCheckpoint`.

    Dense arrays are read-only views of the mapped files; an expert is read into memory of its own. JAX on a CPU can
    adopt both as they are.

    Attributes:
      directory: where it lies.
      architecture: read from config.json, end tokens from generation_config.json where it names them.
      quantization: of `quantize.FORMATS`.
      dtype: dtype of the experts' matrices as stored: "bfloat16", ..., "int8", or "uint8" (two int4 each, or packed).
      dense_spec: shapes and dtypes of the dense arrays, by path.
      expert_spec: shapes and dtypes of one expert, `ExpertWeights` of `jax.ShapeDtypeStruct`.
      expert_bytes: bytes of one expert as stored, without padding.
    """

    def __init__(self, directory: str | Path):
        """Reads the manifest and all headers, no weights.

        Raises:
          UserError: a file is missing, truncated or changed, or the manifest or config.json is of another model.
        """
        self.directory = Path(directory)
        manifest = read_json(self.directory / MANIFEST) or {}
        config = read_json(self.directory / "config.json")
        if config is None:
            raise UserError(f"{directory} has no config.json; copy it from the source of the conversion")
        if manifest.get("format") != FORMAT:
            raise UserError(f"{self.directory / MANIFEST} is not of this version of moe_jax ({FORMAT!r}); {REDO}")
        self.architecture = a = with_generation_config(family(config).read_config(config), self.directory)
        try:
            self.quantization, self._matrix = manifest["quantization"], MATRICES.get(manifest["matrices"])
            self._checksums = {name: int(entry["crc32"], 16) for name, entry in manifest["blocks"].items()}
            self._blocks = self._locate(manifest["files"], manifest["blocks"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.directory / MANIFEST} is damaged; {REDO}") from None
        keys = [(layer, e) for layer in range(a.num_moe_layers) for e in range(a.num_experts)]
        names = [expert_block(a, *key) for key in keys]
        dense = [name for name in self._blocks if name.startswith("dense.")]
        other = UserError(f"{directory}: config.json describes another model than the manifest; {REDO}")
        if set(self._blocks) != {*names, *dense}:
            raise other
        self.dense_spec = {_path(name): _spec(self._blocks[name].tensors[name]) for name in dense}
        first = self._blocks[names[0]].tensors
        self.expert_spec = expert_weights(
            {name.removeprefix(names[0] + "."): _spec(tensor) for name, tensor in first.items()}, self._matrix
        )
        rows = {name: shape[0] for name, shape in a.expert_shapes().items()}
        found = {field: {x.shape[0] for x in jax.tree.leaves(getattr(self.expert_spec, field))[:1]} for field in rows}
        embedding = self.dense_spec.get(("embedding",))
        if found != {field: {count} for field, count in rows.items()} or (
            embedding is None or embedding.shape != (a.vocab_size, a.d_model)
        ):
            raise other
        self.expert_bytes = sum(tensor.nbytes for tensor in first.values())
        self.dtype = jax.tree.leaves(self.expert_spec.gate_up)[0].dtype.name
        self._maps = {name: _map(self.directory / name) for name in manifest["files"]}

    def dense(self) -> dict[str, Any]:
        """All dense weights: numpy arrays in the tree of `nnx.to_pure_dict` of `layers.Decoder`.

        Raises:
          UserError: a block is not what was written.
        """
        tree: dict[Any, Any] = {}
        for path in self.dense_spec:
            node = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = self.dense_array(path)
        return tree

    def dense_array(self, path: tuple[str | int, ...]) -> np.ndarray:
        """One dense array."""
        return self._read(dense_block(path))[dense_block(path)]

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """One expert as numpy arrays; layers are counted among those that have experts.

        Raises:
          UserError: the block is not what was written.
        """
        name = expert_block(self.architecture, layer, expert)
        block = self._blocks[name]
        memory = empty((block.nbytes,), np.dtype(np.uint8))
        with block.file.open("rb", buffering=0) as file:
            file.seek(block.start)
            _fill(memory.data, file)
        return self._expert(name, self._checked(name, memory))

    def expert_views(self, layer: int, expert: int, memory: np.ndarray) -> ExpertWeights:
        """The arrays of an expert whose block has been read into `memory`, uint8; views, not checked."""
        name = expert_block(self.architecture, layer, expert)
        return self._expert(name, _views(self._blocks[name], memory))

    def expert_location(self, layer: int, expert: int) -> Block:
        """Where an expert lies, for whoever reads the file itself (start and size are multiples of 4096)."""
        return self._blocks[expert_block(self.architecture, layer, expert)]

    def _read(self, name: str) -> dict[str, np.ndarray]:
        """The tensors of a block, checked."""
        block = self._blocks[name]
        mapped, skip = self._maps[block.file.name], block.start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, block.start - skip, block.nbytes + skip)  # one large read, not page by page
        return self._checked(name, np.frombuffer(mapped, np.uint8, block.nbytes, block.start))

    def _checked(self, name: str, data: np.ndarray) -> dict[str, np.ndarray]:
        block = self._blocks[name]
        if zlib.crc32(data.data) != self._checksums[name]:
            raise UserError(f"{block.file} is damaged: {name} does not have the checksum of its conversion; {REDO}")
        return _views(block, data)

    def _expert(self, name: str, parts: dict[str, np.ndarray]) -> ExpertWeights:
        return expert_weights({part.removeprefix(name + "."): x for part, x in parts.items()}, self._matrix)

    def _locate(self, files: dict[str, Any], entries: dict[str, Any]) -> dict[str, Block]:
        """Every block with its tensors, from headers that are what was written."""
        tensors: dict[str, list[tuple[str, Tensor]]] = {}
        for name, entry in files.items():
            file = self.directory / name
            if not file.is_file():
                raise UserError(f"{file} is missing; {REDO}")
            if file.stat().st_size != entry["bytes"]:
                raise UserError(
                    f"{file} has {file.stat().st_size} bytes, not {entry['bytes']}: it is truncated; {REDO}"
                )
            with file.open("rb") as f:
                head = f.read(8)
                head += f.read(min(int.from_bytes(head, "little"), entry["bytes"]))
            if zlib.crc32(head) != int(entry["header_crc32"], 16):
                raise UserError(f"{file} is damaged: its header does not have the checksum of its conversion; {REDO}")
            inside = [(part, t) for part, t in read_header(file).items() if not part.startswith(PAD)]
            tensors[name] = sorted(inside, key=lambda item: item[1].start)
        blocks = {}
        ordered = sorted(entries.items(), key=lambda item: (item[1]["file"], item[1]["start"]))
        for name, entry in ordered:
            rest, end, inside = tensors[entry["file"]], entry["start"] + entry["bytes"], {}
            while rest and rest[0][1].start < end:
                part, tensor = rest.pop(0)
                inside[part] = tensor
            blocks[name] = Block(self.directory / entry["file"], entry["start"], entry["bytes"], inside)
        return blocks


def _views(block: Block, data: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a block by name, as views of its bytes."""
    return {
        part: data[t.start - block.start :][: t.nbytes].view(DTYPES[t.dtype]).reshape(t.shape)
        for part, t in block.tensors.items()
    }


def _fill(view: memoryview, file: FileIO) -> None:
    """Reads until `view` is full or the file ends, which its checksum will tell."""
    while view and (count := file.readinto(view)):
        view = view[count:]


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def _path(block: str) -> tuple[str | int, ...]:
    """Inverse of `dense_block`."""
    return tuple(int(key) if key.isdigit() else key for key in block.split(".")[1:])


def _spec(tensor: Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tensor.shape, DTYPES[tensor.dtype])

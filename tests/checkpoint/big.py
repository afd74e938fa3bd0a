"""Random Mixtrals of gigabytes, written as fast as the disk takes them, with experts of the released model's size."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from moe_jax.checkpoint.families import mixtral
from moe_jax.checkpoint.hf import INDEX
from moe_jax.checkpoint.names import Rows
from moe_jax.model.architecture import Architecture

SHARD = 1 << 30  # bytes after which a new file begins


def mixtral_of(nbytes: float, d: int = 4096, ff: int = 14336) -> Architecture:
    """Widths and vocabulary of Mixtral-8x7B, with as many experts (352 MB each, in two layers) as make `nbytes`."""
    vocabulary, layers = 32000, 2
    dense = 2 * (2 * vocabulary * d + layers * 5 * d * d // 2)
    return mixtral.architecture(
        vocab_size=vocabulary,
        d_model=d,
        num_layers=layers,
        num_heads=d // 128,
        num_kv_heads=d // 512,
        head_dim=128,
        num_experts=max(2, math.ceil((nbytes - dense) / (layers * 2 * 3 * d * ff))),
        top_k=2,
        expert_ff=ff,
        max_seq_len=32768,
    )


def write_big(directory: Path, a: Architecture, seed: int = 0) -> int:
    """Writes bfloat16 shards and their index; returns the bytes of all tensors.

    Every tensor is a stretch of one block of 32 MB of normal numbers, repeated from a place of its own: no two are
    alike, and making them costs nothing.
    """
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    block = (0.02 * rng.standard_normal(1 << 24, np.float32)).astype(ml_dtypes.bfloat16).view(np.uint8)
    shapes = {piece.name: piece.shape for rows in _rows(a) for piece in rows}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(_nbytes, shards[-1].values())) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file, at, header = f"model-{i:05}-of-{len(shards):05}.safetensors", 0, {}
        for name, shape in shard.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, at := at + _nbytes(shape))}
        text = json.dumps(header).encode()
        with (directory / file).open("wb", buffering=0) as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for shape in shard.values():
                start, left = 2 * int(rng.integers(len(block) // 2)), _nbytes(shape)
                while left:
                    left -= f.write(block[start : start + left].data)
                    start = 0
        where |= dict.fromkeys(shard, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": where}))
    (directory / "config.json").write_text(json.dumps(mixtral.write_config(a, "bfloat16")))
    return sum(map(_nbytes, shapes.values()))


def drop_from_cache(directory: Path) -> None:
    """Writes the files of a directory to the disk and forgets their pages: the next reader finds a cold cache."""
    for file in directory.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _rows(a: Architecture) -> list[Rows]:
    names = mixtral.layouts(a)[0]
    experts = [names.expert(layer, e) for layer in range(a.num_layers) for e in range(a.num_experts)]
    return [*names.dense.values(), *(rows for parts in experts for rows in parts.values())]


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)

"""What a log says of a model's routing: entropy, load, co-activation, and how far choices repeat.

    python -m moe_jax.analysis.routing DIR       an activation log, such as runs/predictor/log/train
    python -m moe_jax.analysis.routing FILE.parquet --experts=64

A Parquet file (needs `pip install pyarrow`) brings the routing of another engine: one row per token and layer, with the
columns `sequence` and `position` (integers; positions of a sequence count up), `layer` (among those with experts) and
`experts` (a list of the K expert numbers, the first choice first). Rows may come in any order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import UserError


def read_log(directory: Path) -> tuple[Iterator[np.ndarray], int]:
    """Expert ids int [L, T, K] of every window of an activation log, and the number of experts."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        lengths = np.load(directory / "windows.npz")["lengths"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} is not an activation log ({error}); train_predictor.py makes one") from None

    def windows() -> Iterator[np.ndarray]:
        start = 0
        for shard in sorted(directory.glob("shard_?????")):
            for ids in np.load(shard / "ids.npy", mmap_mode="r"):
                yield np.asarray(ids[:, : lengths[start]], np.int64)
                start += 1

    return windows(), manifest["spec"]["num_experts"]


def read_parquet(file: Path) -> list[np.ndarray]:
    """Expert ids int [L, T, K] of every sequence of a routing trace.

    Raises:
      UserError: pyarrow is missing, or the file does not follow the schema above.
    """
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.read_table(file, columns=["sequence", "position", "layer", "experts"])
        sequence, position, layer = (table[name].to_numpy() for name in ("sequence", "position", "layer"))
        experts = np.array(table["experts"].to_pylist(), np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not a routing trace ({' '.join(str(error).split())[:200]})") from None
    found = []
    for own in np.unique(sequence):
        rows = np.flatnonzero(sequence == own)
        rows = rows[np.lexsort((position[rows], layer[rows]))]
        layers = layer[rows].max() + 1
        if len(rows) % layers or (np.bincount(layer[rows], minlength=layers) != len(rows) // layers).any():
            raise UserError(f"{file}: sequence {own} does not have every layer of every token once")
        found.append(experts[rows].reshape(layers, len(rows) // layers, -1))
    return found


def summarise(windows: Any, num_experts: int) -> dict[str, Any]:
    """Of windows of expert ids [L, T, K], a list with one number per layer each.

    Returns:
      entropy: of the load, in bits (log2 E when even). load_least, load_most: over the fair share.
      coactivation: the most frequent pair of one token, over what independent choices of this load would give.
      token_locality: share of a token's experts that the token before used in the same layer.
      layer_locality: how much one layer's first choice tells of the next one's, in bits (mutual information); the last
      layer's is None.
    """
    L: Any = None
    for ids in windows:
        if L is None:
            L, E = len(ids), num_experts
            load, same, asked = np.zeros((L, E)), np.zeros(L), np.zeros(L)
            pairs, following = np.zeros((L, E, E)), np.zeros((L, E, E))
        hot = np.zeros((*ids.shape[:2], E))
        np.put_along_axis(hot, ids, 1, -1)
        load += hot.sum(1)
        pairs += np.einsum("lte,ltf->lef", hot, hot)
        same += (hot[:, 1:] * hot[:, :-1]).sum((1, 2))
        asked += hot[:, 1:].sum((1, 2))
        for layer in range(L - 1):
            np.add.at(following[layer], (ids[layer, :, 0], ids[layer + 1, :, 0]), 1)
    if L is None:
        raise UserError("the log holds no complete shard yet; let train_predictor.py go on")
    share = load / load.sum(1, keepdims=True)
    tokens = load.sum(1) / ids.shape[-1]
    chance = load[:, :, None] * load[:, None, :] / tokens[:, None, None]
    lift = np.where(np.eye(E, dtype=bool) | (chance < 1), 0, pairs / np.maximum(chance, 1e-9))
    joint = following / np.maximum(following.sum((1, 2), keepdims=True), 1)
    apart = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
    bits = (joint * np.log2(np.where(joint > 0, joint / np.where(apart > 0, apart, 1), 1))).sum((1, 2))
    return {
        "entropy": (-share * np.log2(np.where(share > 0, share, 1))).sum(1).tolist(),
        "load_least": (share.min(1) * E).tolist(),
        "load_most": (share.max(1) * E).tolist(),
        "coactivation": lift.max((1, 2)).tolist(),
        "token_locality": (same / np.maximum(asked, 1)).tolist(),
        "layer_locality": [*bits[:-1].tolist(), None],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Summary of the routing in an activation log or a Parquet trace.")
    parser.add_argument("source", type=Path)
    parser.add_argument("--experts", type=int, help="number of experts, with Parquet")
    arguments = parser.parse_args()
    if arguments.source.suffix == ".parquet":
        if not arguments.experts:
            raise UserError("a Parquet trace does not say how many experts there are: give --experts")
        windows, experts = read_parquet(arguments.source), arguments.experts
    else:
        windows, experts = read_log(arguments.source)
    found = summarise(windows, experts)
    print("layer " + " ".join(f"{name:>14}" for name in found))
    for layer, row in enumerate(zip(*found.values(), strict=True)):
        print(f"{layer:5} " + " ".join(f"{'-' if value is None else f'{value:.3f}':>14}" for value in row))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

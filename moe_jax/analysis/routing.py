"""What a log says of a model's routing: entropy, load, co-activation, and how far choices repeat.

    python -m moe_jax.analysis.routing DIR [--replay]      an activation log, such as runs/predictor/log/train
    python -m moe_jax.analysis.routing FILE.parquet --experts=64 [--replay]        another engine's routing

`--replay` runs what needs nothing but the routing: recall of the predictors `repeat`, `frequency` and `random`, and
what the eviction policies would load. (A network is trained on residuals, which no such trace holds, and is of one
model: train_predictor.py logs that model itself.)

A Parquet file (needs `pip install "moe_jax[parquet]"`) has one row per token and layer, in any order, and the columns

    sequence   integer     the text that the token is of
    position   integer     of the token in its text; any numbers that count up
    layer      integer     0, 1, ... among the layers with experts; all of them for every token
    experts    list<int>   the K experts that the router chose, 0 to --experts less one, the first choice first
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import cli
from moe_jax.errors import UserError

LEAST_EXPECTED = 25  # pairs, below which the most frequent one of many is so by chance
SHUFFLES = 4  # of the tokens, for what their number alone gives
MOST_BY_CHANCE = 0.75  # of the bits that there could be, above which too few tokens are left to tell


def read_log(directory: Path) -> tuple[Iterator[np.ndarray], int]:
    """Expert ids int [L, T, K] of every window of an activation log, and the number of experts.

    Shards that are missing are left out.

    Raises:
      UserError: it is no such log; and, while the windows are read, a shard is damaged.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        num_experts, size = int(manifest["spec"]["num_experts"]), int(manifest["shard_windows"])
        lengths = np.load(directory / "windows.npz")["lengths"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{directory} is not an activation log ({reason}); train_predictor.py makes one") from None

    def windows() -> Iterator[np.ndarray]:
        for shard, start in enumerate(range(0, len(lengths), size)):
            folder, own = directory / f"shard_{shard:05d}", lengths[start : start + size]
            if not folder.is_dir():
                continue  # not written yet, or deleted to be written again
            try:
                found = np.load(folder / "ids.npy", mmap_mode="r")
                if len(found) != len(own):
                    raise ValueError(f"{len(found)} windows instead of {len(own)}")
            except (OSError, ValueError) as error:
                raise UserError(f"shard {folder} cannot be read ({error}); delete that folder") from None
            for ids, length in zip(found, own, strict=True):
                yield np.asarray(ids[:, :length], np.int64)

    return windows(), num_experts


def read_parquet(file: Path, num_experts: int) -> list[np.ndarray]:
    """Expert ids int [L, T, K] of every sequence of a routing trace.

    Raises:
      UserError: pyarrow is missing, or the file does not follow the schema above.
    """
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError('reading Parquet needs pyarrow: pip install "moe_jax[parquet]"') from None
    try:
        table = parquet.read_table(file, columns=["sequence", "position", "layer", "experts"])
        if not table.num_rows or any(column.null_count for column in table.columns):
            raise ValueError("no rows" if not table.num_rows else "a value is missing")
        sequence, position, layer = (table[name].to_numpy() for name in ("sequence", "position", "layer"))
        if any(not np.issubdtype(column.dtype, np.integer) for column in (sequence, position, layer)):
            raise ValueError("sequence, position and layer must be integers")
        sequence, position, layer = (column.astype(np.int64) for column in (sequence, position, layer))
        experts = np.array(table["experts"].to_pylist())
        if experts.size and not np.issubdtype(experts.dtype, np.integer):
            raise ValueError("experts must be lists of integers")
        experts = experts.astype(np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a routing trace ({' '.join(str(error).split())[:200]})") from None
    if experts.ndim != 2 or not experts.shape[1]:
        raise UserError(f"{file}: every row must list as many experts")
    if (beyond := experts[(experts < 0) | (experts >= num_experts)]).size:
        raise UserError(f"{file}: expert {beyond[0]} is not among 0 to {num_experts - 1}; see --experts")
    if (np.diff(np.sort(experts, 1), axis=1) == 0).any():
        raise UserError(f"{file}: a row lists an expert twice")
    if layer.min() < 0:
        raise UserError(f"{file}: layers are counted from 0")
    layers = layer.max() + 1
    found = []
    for own in np.unique(sequence):
        rows = np.flatnonzero(sequence == own)
        rows = rows[np.lexsort((position[rows], layer[rows]))]
        if len(rows) % layers or (np.bincount(layer[rows], minlength=layers) != len(rows) // layers).any():
            raise UserError(f"{file}: sequence {own} does not have every layer of every token once")
        at = position[rows].reshape(layers, -1)
        if (np.diff(at[0]) == 0).any():
            raise UserError(f"{file}: sequence {own} has two rows of one position and layer; each may have one")
        if (at != at[0]).any():
            raise UserError(f"{file}: sequence {own} has other positions in one layer than in another")
        found.append(experts[rows].reshape(layers, len(rows) // layers, -1))
    return found


def summarise(windows: Any, num_experts: int) -> dict[str, Any]:
    """Of windows of expert ids [L, T, K], a list with one number per layer each.

    Returns:
      entropy: of the load, in bits (log2 E when even). load_least, load_most: over the fair share.
      coactivation: the most frequent pair of one token, over what independent choices of this load would give; None
      where no pair is expected LEAST_EXPECTED times.
      token_locality: share of a token's experts that the token before used in the same layer.
      layer_locality: how much one layer's first choice tells of the next one's, in bits: mutual information, adjusted
      for chance (Vinh et al. 2010), so that shuffled tokens give 0 and a choice that follows from the other its whole
      entropy. None for the last layer, and where shuffled tokens give more than MOST_BY_CHANCE of that entropy.
    """
    L: Any = None
    firsts: list[np.ndarray] = []
    for ids in windows:
        if L is None:
            L, E = len(ids), num_experts
            load, same, asked = np.zeros((L, E)), np.zeros(L), np.zeros(L)
            pairs = np.zeros((L, E, E))
        hot = np.zeros((*ids.shape[:2], E))
        np.put_along_axis(hot, ids, 1, -1)
        load += hot.sum(1)
        pairs += np.einsum("lte,ltf->lef", hot, hot)
        same += (hot[:, 1:] * hot[:, :-1]).sum((1, 2))
        asked += hot[:, 1:].sum((1, 2))
        firsts.append(ids[..., 0].astype(np.int32))
    if L is None:
        raise UserError("the log holds no complete shard yet; let train_predictor.py go on")
    share = load / load.sum(1, keepdims=True)
    tokens = load.sum(1) / ids.shape[-1]
    chance = load[:, :, None] * load[:, None, :] / tokens[:, None, None]
    told = ~np.eye(E, dtype=bool) & (chance >= LEAST_EXPECTED)
    lift = np.where(told, pairs / np.maximum(chance, 1e-9), 0)
    first = np.concatenate(firsts, 1)
    return {
        "entropy": _bits(load).tolist(),
        "load_least": (share.min(1) * E).tolist(),
        "load_most": (share.max(1) * E).tolist(),
        "coactivation": [
            float(x.max()) if any_told else None for x, any_told in zip(lift, told.any((1, 2)), strict=True)
        ],
        "token_locality": (same / np.maximum(asked, 1)).tolist(),
        "layer_locality": [*(_adjusted(first[n], first[n + 1], E) for n in range(L - 1)), None],
    }


def _bits(counts: np.ndarray) -> np.ndarray:
    """Entropy of counts [..., N]."""
    share = counts / counts.sum(-1, keepdims=True)
    return (-share * np.log2(np.where(share > 0, share, 1))).sum(-1)


def _adjusted(first: np.ndarray, second: np.ndarray, num_experts: int) -> float | None:
    """Mutual information of two layers' choices int [T], in bits, adjusted for chance; None: too few tokens to tell."""
    each = [_bits(np.bincount(x, minlength=num_experts)) for x in (first, second)]
    shared = lambda a, b: sum(each) - _bits(np.bincount(a * num_experts + b))
    rng = np.random.default_rng(0)
    chance = np.mean([shared(first, rng.permutation(second)) for _ in range(SHUFFLES)])
    if (most := min(each)) == 0:
        return 0.0
    return float((shared(first, second) - chance) / (most - chance) * most) if chance <= MOST_BY_CHANCE * most else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of an activation log, or a Parquet file")
    parser.add_argument("--experts", type=int, help="number of experts of a layer, with Parquet")
    parser.add_argument("--replay", action="store_true", help="predictors and eviction policies on this routing")
    parser.add_argument(
        "--budget", type=float, default=25, help="share of all experts in %% that replayed policies keep"
    )
    parser.add_argument("--tokens", type=int, default=256, help="tokens that policies replay")
    arguments = parser.parse_args()
    if arguments.source.suffix == ".parquet":
        if not arguments.experts:
            raise UserError("a Parquet trace does not say how many experts there are: give --experts")
        windows, experts = read_parquet(arguments.source, arguments.experts), arguments.experts
    else:
        windows, experts = read_log(arguments.source)
        windows = list(windows)
    found = summarise(windows, experts)
    tokens = sum(ids.shape[1] for ids in windows)
    print(f"{tokens:,} tokens (-: too few to tell it from chance, or there is no next layer)")
    print("layer " + " ".join(f"{name:>14}" for name in found))
    for layer, row in enumerate(zip(*found.values(), strict=True)):
        print(f"{layer:5} " + " ".join(f"{'-' if value is None else f'{value:.3f}':>14}" for value in row))
    if arguments.replay:
        _replay(windows, experts, arguments.budget, arguments.tokens)


def _replay(windows: list[np.ndarray], experts: int, budget: float, tokens: int) -> None:
    from moe_jax.analysis import replay

    L, _, K = windows[0].shape
    if not 0 < budget <= 100 or tokens < 1:
        raise UserError("--budget is a share in %, --tokens at least 1")
    capacity = int(L * experts * budget / 100)
    loads = replay.loads(windows, capacity, tokens)
    shown = lambda values: " ".join(f"{'-' if x is None else f'{100 * x:.1f}':>6}" for x in values)
    print(f"\nrecall@{K} in %, by layers ahead")
    for name, scores in replay.recall(windows, experts).items():
        for wrapped, where in ((False, "same token"), (True, "next token")):
            print(f"{name:>12} {where} {shown(scores.by_horizon('recall', wrapped))}")
    print(f"\nexperts loaded per token of {L * K} needed, on demand, {capacity} of {L * experts} kept")
    for name, count in loads.items():
        print(f"{name:>12} {count:.3f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        cli.fail(str(error))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")

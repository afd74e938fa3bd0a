"""Shapes of a request, and which token rows go to which expert call. Depends on the request and its routing alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from moe_jax.errors import UserError

MAX_ARITY = 8
SMALL_CHUNK, LEAST_CAPACITY = 32, 256


def power_of_two(n: int) -> int:
    """The smallest that is no less than n."""
    return 1 << max(n - 1, 0).bit_length()


def padded(batch: int) -> int:
    """Rows of a batch with its padding: 1, 8, 16, 32, ...; all batches up to 8 share their executables."""
    return 1 if batch == 1 else max(8, power_of_two(batch))


def request_shapes(
    prompt_lengths: Sequence[int], new_tokens: int, prefill_chunk: int, max_seq_len: int
) -> tuple[int, int, int]:
    """(B, tokens per row and chunk, cache capacity) of a request: few values, so that executables are few.

    Args:
      prefill_chunk: token rows of one chunk of the prefill, over all prompts.
      max_seq_len: most positions of a row.

    Raises:
      UserError: a prompt is empty or does not fit the context.
    """
    longest = max(prompt_lengths)
    if min(prompt_lengths) < 1:
        raise UserError("the prompt is empty; give at least one token")
    if longest >= max_seq_len:
        raise UserError(
            f"the prompt has {longest} tokens and leaves no room to generate in a context of {max_seq_len};"
            " shorten it, or raise --config.max_seq_len if the model allows"
        )
    batch = padded(len(prompt_lengths))
    small, large = SMALL_CHUNK, max(1, prefill_chunk // batch)
    capacity = min(max(power_of_two(longest + new_tokens), LEAST_CAPACITY), max(max_seq_len, 64))
    return batch, small if batch == 1 and longest <= small else large, capacity


def bucket(count: int, limit: int) -> int:
    """Rows of one expert call: 1, 8, 32, 128, ..., at most `limit`; few executables. Where calls are small, 2 as well:
    two rows of a decoding batch often choose one expert."""
    size = 1
    while size < count:
        size = (2 if limit <= 8 else 8) if size == 1 else size * 4
    return min(size, limit)


ROWS = (1, 8, 32, 128, 256)
"""Token rows of an expert call in a prefill."""
CALL_ROWS = 32
"""Token rows that take as long as reading an expert's weights does (2 cores: 30 to 40)."""


def sizes(rows: int) -> tuple[int, ...]:
    """Those of `ROWS` that calls for so many token rows have: the smallest are not worth an executable to many rows."""
    return tuple(size for size in ROWS if size <= rows and (rows <= 64 * size or size == ROWS[-1]))


@functools.cache
def calls(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The calls, of some of `sizes`, that give `count` token rows to an expert soonest; the largest first."""
    if count <= 0:
        return ()
    largest = sizes[-1]
    if count > largest:
        return (largest, *calls(count - largest, sizes))
    ways = [(size, *calls(count - size, sizes[: i + 1])) for i, size in enumerate(sizes)]
    return min(ways, key=lambda way: sum(way) + CALL_ROWS * len(way))


def arities(count: int, top_k: int) -> list[int]:
    """Splits `count` experts into calls of 1, 2, 4 or 8, none larger than K: K experts always fit the budget."""
    sizes, arity = [], MAX_ARITY
    while count:
        while arity > min(count, top_k):
            arity //= 2
        sizes.append(arity)
        count -= arity
    return sizes


def groups(experts: Sequence[int], most: int) -> list[Sequence[int]]:
    """Experts in calls of `arities`, in their order."""
    starts = itertools.accumulate(sizes := arities(len(experts), most), initial=0)
    return [experts[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def unique_in_order(ids: np.ndarray, active: np.ndarray) -> list[int]:
    """Experts of the active rows in router order, int [R, K] and bool [R]: each once, by first appearance."""
    return list(dict.fromkeys(ids[active].ravel().tolist()))


def used_by_token(ids: np.ndarray, lengths: np.ndarray, num_experts: int) -> np.ndarray:
    """Experts that the tokens of prompts use, bool [T, E], as if they were decoded side by side and ended together.

    Args:
      ids: int [B, >= T, K], the router's choice.
      lengths: int [B], tokens of each prompt.
    """
    longest = int(lengths.max())
    used = np.zeros((longest, num_experts), bool)
    for row, length in enumerate(lengths.tolist()):
        used[np.arange(longest - length, longest)[:, None], ids[row, :length]] = True
    return used


def assign(ids: np.ndarray, active: np.ndarray, experts: Sequence[int], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and output slots of a group of experts, as `run_experts` takes them.

    Args:
      ids: int [R, K], the router's choice; active: bool [R], rows that count.
      experts: the A experts of the call.
      limit: largest bucket.

    Returns:
      rows and slots, int32 [A, b], padded with 0 and R * K.
    """
    R, K = ids.shape
    found = [np.nonzero((ids == expert) & active[:, None]) for expert in experts]
    size = bucket(max(len(row) for row, _ in found), limit)
    rows = np.zeros((len(experts), size), np.int32)
    slots = np.full((len(experts), size), R * K, np.int32)
    for a, (row, choice) in enumerate(found):
        rows[a, : len(row)] = row
        slots[a, : len(row)] = row * K + choice
    return rows, slots

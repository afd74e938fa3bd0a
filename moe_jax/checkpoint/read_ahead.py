"""One thing is read while the one before it is written, as far as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(
    names: Sequence[str],
    read: Callable[[str], T],
    held: Callable[[str], int],
    needed: Callable[[str], int],
    limit: int,
) -> Generator[T]:
    """Yields `read(name)` for every name, in order; whoever gets it drops it before the next is asked for.

    Args:
      read: runs in a thread of its own, one call at a time; what it raises is raised here, in its turn.
      held: bytes of what `read` gives.
      needed: the most bytes that `read` takes while it runs, with what it gives.
      limit: bytes; the next is read ahead only if what is held and what it needs fit.
    """
    coming: Future[T] | None = None
    with ThreadPoolExecutor(1) as pool:
        for name, after in zip(names, [*names[1:], None], strict=True):
            value = read(name) if coming is None else coming.result()
            coming = None  # a future keeps its result
            if after is not None and held(name) + needed(after) <= limit:
                coming = pool.submit(read, after)
            yield value
            del value

"""An independent reader: plain threads that move the experts that they are told to, and nothing else.

What it takes says what the link gives (T), and beside the replayed executables what overlap the machine allows.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.checkpoint.converted import Converted
from moe_jax.memory import pages
from moe_jax.model.experts import Key

DEPTHS = (1, 2, 4, 8)
SPREAD_BYTES = 1 << 27
"""That are read before the first memory is read into again. Over what was read just before, a read is about 1.1
times as fast (measured, 5 MB): no run can have that, as it keeps what it reads."""


class Reading:
    """`depth` threads move `keys` in order, from now on.

    Args:
      move: brings one expert over the link and drops it; blocks with the GIL released, from any thread.
    """

    def __init__(self, move: Callable[[Key], None], keys: Sequence[Key], depth: int):
        self._move, self._keys = move, iter(keys)
        self._lock, self._error = threading.Lock(), None
        self._ended = [0.0] * depth
        self._began = time.perf_counter()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(depth)]
        for thread in self._threads:
            thread.start()

    def seconds(self) -> float:
        """Waits for the end; seconds from the start to the last expert."""
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return max(self._ended) - self._began

    def _run(self, index: int) -> None:
        try:
            while True:
                with self._lock:
                    key = next(self._keys, None)
                if key is None:
                    break
                self._move(key)
        except BaseException as error:
            self._error = error
        self._ended[index] = time.perf_counter()


def best_depth(move: Callable[[Key], None], keys: Sequence[Key], depths: Sequence[int] = DEPTHS) -> int:
    """The number of threads that moves `keys` fastest."""
    times = {depth: Reading(move, keys, depth).seconds() for depth in depths}
    return min(times, key=times.__getitem__)


class DiskReader:
    """Reads blocks of a converted checkpoint past the page cache, whole, into memory that changes as a run's does."""

    def __init__(self, checkpoint: Converted):
        a = checkpoint.architecture
        keys = [(layer, expert) for layer in range(a.num_moe_layers) for expert in range(a.num_experts)]
        self._blocks = {key: checkpoint.expert_location(*key) for key in keys}
        self._files = {file: _open(file) for file in {block.file for block in self._blocks.values()}}
        nbytes = max(block.nbytes for block in self._blocks.values())
        count = max(*DEPTHS, -(-SPREAD_BYTES // nbytes))
        memory = pages(count * nbytes)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1  # no read should wait for pages that are new
        self._memory: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for start in range(0, count * nbytes, nbytes):
            self._memory.put(memoryview(memory)[start : start + nbytes])

    def move(self, key: Key) -> None:
        """Reads one expert."""
        block, memory = self._blocks[key], self._memory.get()
        handle, direct = self._files[block.file]
        view, at = memory[: block.nbytes], block.start
        while view:
            count = os.preadv(handle, [view], at)
            if not count:
                raise OSError(f"{block.file} ended at byte {at}")
            view, at = view[count:], at + count
        self._memory.put(memory)
        if not direct:
            os.posix_fadvise(handle, block.start, block.nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes the files."""
        for handle, _ in self._files.values():
            os.close(handle)


def _open(file: os.PathLike[str]) -> tuple[int, bool]:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT), True
    except OSError:  # some file systems have no O_DIRECT
        return os.open(file, os.O_RDONLY), False

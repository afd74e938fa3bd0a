"""Page-aligned memory that becomes JAX arrays without a copy, and is used again only once those arrays are gone.

On the CPU backend a `jax.Array` made from aligned numpy memory *is* that memory, and `may_alias=False` does not change
it (jax #37830). A buffer lent again too early would hence change an expert under a running computation. So a buffer
comes back only through the finalizer of the object that every array made from it keeps alive. (A finalizer on the
ndarray or on a memoryview of it fires too early: XLA keeps the owner at the end of the chain of bases alive, not the
views in between.)
"""

from __future__ import annotations

import ctypes
import threading
import weakref

import numpy as np

from moe_jax.memory import pages

ARENA_BYTES = 1 << 26
"""Of small buffers that are cut from one mapping: huge pages then cover nearly all of them, wherever a buffer ends."""


class Buffers:
    """Buffers of equal size, made when first wanted and then lent again and again."""

    def __init__(self, nbytes: int):
        """`nbytes` of each buffer, a multiple of the page size."""
        self._nbytes = nbytes
        self._fresh: list[memoryview] = []  # never lent: no memory is behind them yet
        self._free: list[memoryview] = []
        self._lock = threading.Lock()  # finalizers run in whichever thread drops the last reference
        self.count = 0  # buffers lent so far, each counted once

    def lend(self) -> np.ndarray:
        """A uint8 array [nbytes], contents undefined, free again once it and every array made from it are gone."""
        with self._lock:
            memory = self._free.pop() if self._free else self._first_use()
        owner = (ctypes.c_uint8 * self._nbytes).from_buffer(memory)
        weakref.finalize(owner, self._take_back, memory).atexit = False
        return np.frombuffer(owner, np.uint8)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def _first_use(self) -> memoryview:
        if not self._fresh:
            count = max(1, ARENA_BYTES // self._nbytes)
            arena = memoryview(pages(count * self._nbytes))
            self._fresh = [arena[i * self._nbytes : (i + 1) * self._nbytes] for i in reversed(range(count))]
        self.count += 1
        return self._fresh.pop()

    def _take_back(self, memory: memoryview) -> None:
        # A finalizer may interrupt this very thread inside `lend`; list.append needs no lock of ours.
        self._free.append(memory)

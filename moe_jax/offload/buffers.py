"""Page-aligned memory that becomes JAX arrays without a copy, and is used again only once those arrays are gone.

On the CPU backend a `jax.Array` made from aligned numpy memory *is* that memory, and `may_alias=False` does not change
it (jax #37830). A buffer lent again too early would hence change an expert under a running computation. So a buffer
comes back only through the finalizer of the object that every array made from it keeps alive. (A finalizer on the
ndarray or on a memoryview of it fires too early: XLA keeps the owner at the end of the chain of bases alive, not the
views in between.)
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref

import numpy as np


class Buffers:
    """Buffers of equal size, made when first wanted and then lent again and again."""

    def __init__(self, nbytes: int):
        """`nbytes` of each buffer, a multiple of the page size."""
        self._nbytes = nbytes
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()  # finalizers run in whichever thread drops the last reference
        self.count = 0  # buffers made so far

    def lend(self) -> np.ndarray:
        """A uint8 array [nbytes], contents undefined, free again once it and every array made from it are gone."""
        with self._lock:
            memory = self._free.pop() if self._free else None
            self.count += memory is None
        if memory is None:
            # Private, so that it counts as what it is: anonymous memory of this process.
            memory = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        owner = (ctypes.c_uint8 * self._nbytes).from_buffer(memory)
        weakref.finalize(owner, self._take_back, memory).atexit = False
        return np.frombuffer(owner, np.uint8)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def _take_back(self, memory: mmap.mmap) -> None:
        # A finalizer may interrupt this very thread inside `lend`; list.append needs no lock of ours.
        self._free.append(memory)

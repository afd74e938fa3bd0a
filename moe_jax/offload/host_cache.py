"""`HostCache`: experts that were read from disk once, kept in host memory under a budget of its own.

For devices with memory of their own, in front of a disk: what the device store has evicted comes back from here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from moe_jax.model.experts import ExpertWeights, Key
from moe_jax.offload.bank import Transfer
from moe_jax.offload.disk import DiskBank


class HostCache:
    """A bank over a `DiskBank`. The least recently loaded experts leave first; thread-safe.

    A load that is served from here counts no bytes: nothing was read.
    """

    def __init__(self, bank: DiskBank, budget_bytes: int):
        """`budget_bytes` of host memory for whole experts; below one expert nothing is kept."""
        self.bank, self.capacity = bank, budget_bytes // bank.expert_bytes
        self.expert_bytes, self.link_bytes = bank.expert_bytes, bank.link_bytes
        self.total_bytes = bank.total_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def start(self, key: Key) -> Transfer:
        """A copy of what is kept, or a read."""
        with self._lock:
            memory = self._kept.get(key)
            if memory is not None:
                self._kept.move_to_end(key)
                return _Copy(self, key, memory)
        return _Fill(self, key)

    def keep(self, key: Key, memory: np.ndarray) -> None:
        """Takes what was read; whoever was loaded least recently makes room."""
        with self._lock:
            if self.capacity:
                self._kept.pop(key, None)
                while len(self._kept) >= self.capacity:
                    self._kept.popitem(last=False)
                self._kept[key] = memory

    def on_device(self, key: Key, memory: np.ndarray) -> ExpertWeights:
        """Device arrays that do not share memory with what is kept."""
        if self.bank.aliases:
            copied = self.bank.memory()
            np.copyto(copied, memory)
            memory = copied
        return self.bank.arrays(key, memory)

    def close(self) -> None:
        """Drops everything and closes the disk bank."""
        with self._lock:
            self._kept.clear()
        self.bank.close()


class _Copy:
    """The transfer of an expert that is in host memory."""

    slices = 1

    def __init__(self, cache: HostCache, key: Key, memory: np.ndarray):
        self._cache, self._key = cache, key
        self._memory: np.ndarray | None = memory
        self._weights: ExpertWeights | None = None

    def size(self, index: int) -> int:
        return 0

    def move(self, index: int) -> None:
        memory, self._memory = self._memory, None
        assert memory is not None
        self._weights = self._cache.on_device(self._key, memory)

    def prepare(self) -> None:
        pass

    def finish(self) -> ExpertWeights:
        weights, self._weights = self._weights, None
        assert weights is not None
        return weights


class _Fill:
    """The transfer of an expert that has to be read, and is kept."""

    def __init__(self, cache: HostCache, key: Key):
        bank = cache.bank
        self._cache, self._key, self._sizes = cache, key, bank.sizes(key)
        self.slices = len(self._sizes)
        self._memory: np.ndarray | None = bank.memory()

    def size(self, index: int) -> int:
        return self._sizes[index]

    def move(self, index: int) -> None:
        assert self._memory is not None
        self._cache.bank.read(self._key, self._memory, index)

    def prepare(self) -> None:
        pass

    def finish(self) -> ExpertWeights:
        memory, self._memory = self._memory, None
        assert memory is not None
        if not self._cache.capacity:
            return self._cache.bank.arrays(self._key, memory)
        self._cache.keep(self._key, memory)
        return self._cache.on_device(self._key, memory)

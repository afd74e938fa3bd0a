"""`DiskBank`: experts read from the aligned files of a conversion, by O_DIRECT, straight into the arrays' memory.

A block is read in slices, so that a demand never waits for more than one slice of a speculative read, and so that a
read that was interrupted for it is resumed and not started again. A slice that fails is read once more. Files are
watched: one that was truncated or replaced since it was opened ends the run rather than serving other weights.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_jax.checkpoint.bank_file import BLOCK_ALIGN
from moe_jax.checkpoint.converted import Converted
from moe_jax.model.experts import ExpertWeights, Key
from moe_jax.offload.bank import Transfer
from moe_jax.offload.buffers import Buffers
from moe_jax.offload.copies import to_device
from moe_jax.offload.settings import Settings


class DiskBank:
    """Reads experts of a converted checkpoint; thread-safe.

    Attributes:
      expert_bytes: of one block, padding included: what its memory holds and what is read.
      buffers: that experts are read into.
      aliases: whether arrays are that memory, as on the CPU.
    """

    def __init__(self, checkpoint: Converted, slice_bytes: int = Settings.slice_bytes, sharers: int = 1):
        """
        Args:
          slice_bytes: most bytes of one read, a multiple of 4096: what a demand may have to wait for. Smaller ones cost
            threads more turns than they win.
          sharers: threads that are to find shares in every expert of more than one slice, as equal as pages allow.
        """
        assert slice_bytes % BLOCK_ALIGN == 0, slice_bytes
        a = checkpoint.architecture
        self._checkpoint, self._most_bytes, self._sharers = checkpoint, slice_bytes, sharers
        keys = [(layer, expert) for layer in range(a.num_moe_layers) for expert in range(a.num_experts)]
        self._blocks = {key: checkpoint.expert_location(*key) for key in keys}
        self._files = {file: _File(file) for file in sorted({block.file for block in self._blocks.values()})}
        self.expert_bytes = self.link_bytes = max(block.nbytes for block in self._blocks.values())
        self.total_bytes = self.expert_bytes * len(keys)
        self.buffers = Buffers(self.expert_bytes)
        device = jax.devices()[0]
        self.aliases = device.platform == "cpu"
        self._pinned, self._device = (SingleDeviceSharding(device, memory_kind=k) for k in ("pinned_host", "device"))

    def start(self, key: Key) -> Transfer:
        """A read of one expert into memory of its own."""
        return _Read(self, key)

    def read(self, key: Key, memory: np.ndarray, index: int) -> None:
        """Reads slice `index` of an expert to where it belongs in `memory`, uint8 [expert_bytes].

        Raises:
          OSError: it failed twice, or the file is not the one that was opened; the text names the file.
        """
        block = self._blocks[key]
        start, size = index * self._slice_bytes(block.nbytes), self.sizes(key)[index]
        part = memory[start : start + size]
        self._files[block.file].read(part, block.start + start)

    def sizes(self, key: Key) -> list[int]:
        """Bytes of each slice of an expert."""
        nbytes = self._blocks[key].nbytes
        size = self._slice_bytes(nbytes)
        return [min(size, nbytes - start) for start in range(0, nbytes, size)]

    def _slice_bytes(self, nbytes: int) -> int:
        """Of each slice of a block but the last, which may be shorter."""
        count = -(-nbytes // self._most_bytes)
        if count > 1:
            count = -(-count // self._sharers) * self._sharers
        return -(-nbytes // (count * BLOCK_ALIGN)) * BLOCK_ALIGN

    def memory(self) -> np.ndarray:
        """Memory for one expert, uint8 [expert_bytes]; see `Buffers`."""
        return self.buffers.lend()

    def arrays(self, key: Key, memory: np.ndarray, prepared: ExpertWeights | None = None) -> ExpertWeights:
        """The expert that was read into `memory`, on the device.

        Args:
          prepared: what `aliasing` gave for this memory, if it was asked.

        Raises:
          OSError: its file is not the one that was opened; the text names it.
        """
        # The bytes may be good, but a file that changes under a run is no bank any more.
        self._files[self._blocks[key].file].check()
        if self.aliases:
            return self.aliasing(key, memory) if prepared is None else prepared
        weights = self._checkpoint.expert_views(*key, memory)  # through pinned memory to the device
        pinned = jax.block_until_ready(jax.device_put(weights, self._pinned))
        return jax.block_until_ready(to_device(pinned, self._device))

    def aliasing(self, key: Key, memory: np.ndarray) -> ExpertWeights:
        """On the CPU: arrays that are this memory, whatever will be in it."""
        # device_put would do, by a longer way through Python. Any way is long, as all of that has left the CPU's caches
        # since the last expert: 0.2 ms an array.
        weights = self._checkpoint.expert_views(*key, memory)
        arrays = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, self._device, lambda _: x), weights)
        for view, array in zip(jax.tree.leaves(weights), jax.tree.leaves(arrays), strict=True):
            assert array.unsafe_buffer_pointer() == view.ctypes.data, "XLA has made a copy"
        return arrays

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


class _Read:
    """A `Transfer` into memory of its own."""

    def __init__(self, bank: DiskBank, key: Key):
        self._bank, self._key = bank, key
        self._memory: np.ndarray | None = bank.memory()
        self._prepared: ExpertWeights | None = None
        self._sizes = bank.sizes(key)
        self.slices = len(self._sizes)

    def size(self, index: int) -> int:
        return self._sizes[index]

    def move(self, index: int) -> None:
        assert self._memory is not None
        self._bank.read(self._key, self._memory, index)

    def prepare(self) -> None:
        memory = self._memory  # None: another thread has finished meanwhile
        if self._bank.aliases and memory is not None:
            self._prepared = self._bank.aliasing(self._key, memory)

    def finish(self) -> ExpertWeights:
        (memory, self._memory), (prepared, self._prepared) = (self._memory, None), (self._prepared, None)
        assert memory is not None
        return self._bank.arrays(self._key, memory, prepared)


class _File:
    """One bank file: O_DIRECT where the file system has it, otherwise buffered reads whose pages are dropped."""

    def __init__(self, path: Path):
        self._path = path
        self._direct = hasattr(os, "O_DIRECT")
        self._handles: list[int] = []  # all stay open, as another thread may read from one; the last is read from
        try:
            self._handles.append(os.open(path, os.O_RDONLY | (os.O_DIRECT if self._direct else 0)))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._be_buffered()
        self._identity = _identity(os.fstat(self._handles[-1]))

    def read(self, part: np.ndarray, offset: int) -> None:
        """Fills `part` from `offset`; both aligned to 4096."""
        try:
            self._read(part, offset)
        except OSError as error:
            if self._direct and error.errno == errno.EINVAL:  # some file systems refuse only the read
                self._be_buffered()
            self.check()
            self._read(part, offset)  # a second time, for the errors that pass

    def close(self) -> None:
        while self._handles:  # their numbers may soon be others'
            with contextlib.suppress(OSError):
                os.close(self._handles.pop())

    def _be_buffered(self) -> None:
        self._handles.append(os.open(self._path, os.O_RDONLY))
        self._direct = False

    def _read(self, part: np.ndarray, offset: int) -> None:
        view, at, handle, direct = part.data, offset, self._handles[-1], self._direct
        while view:
            try:
                count = os.preadv(handle, [view], at)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from None
            if not count:
                raise OSError(f"{self._path} ended at byte {at}: it was truncated; convert the checkpoint again")
            view, at = view[count:], at + count
        if not direct:
            os.posix_fadvise(handle, offset, len(part), os.POSIX_FADV_DONTNEED)

    def check(self) -> None:
        """Raises OSError if the file was truncated, replaced or removed since it was opened."""
        try:
            now = _identity(os.stat(self._path))
        except FileNotFoundError:
            raise OSError(f"{self._path} was removed while it was in use") from None
        if now != self._identity:
            what = "truncated" if now[:2] == self._identity[:2] and now[2] < self._identity[2] else "replaced"
            raise OSError(f"{self._path} was {what} while it was in use; convert the checkpoint again")


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

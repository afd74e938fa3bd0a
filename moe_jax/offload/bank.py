"""Banks hold every expert off the device. `HostBank`: pinned_host arrays. `disk.DiskBank`: aligned files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax.sharding import SingleDeviceSharding

from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import ExpertWeights, Key
from moe_jax.offload.copies import to_device


class Transfer(Protocol):
    """One expert on its way to the device, moved slice by slice by threads that may do other things in between."""

    slices: int

    def size(self, index: int) -> int:
        """Bytes of one slice."""
        ...

    def move(self, index: int) -> None:
        """Moves one slice; blocks, with the GIL released. Each is moved once, in any order, by any thread."""
        ...

    def prepare(self) -> None:
        """Does of `finish` what need not wait for the slices; by any thread, while they move, or not at all."""
        ...

    def finish(self) -> ExpertWeights:
        """The arrays, on the device and ready; once every slice has been moved."""
        ...


class Bank(Protocol):
    """What a loader needs of a bank.

    Attributes:
      expert_bytes: of one expert on the device.
      link_bytes: that the transfer of one expert moves.
    """

    expert_bytes: int
    link_bytes: int

    def start(self, key: Key) -> Transfer:
        """The transfer of one expert into new device arrays; nothing has moved yet."""
        ...

    def close(self) -> None:
        """Lets go of files. May be called again."""
        ...


class AsyncBank(Bank, Protocol):
    """A bank whose copies run beside the thread that starts them."""

    def copy(self, key: Key) -> ExpertWeights:
        """Starts a copy of one expert into new device arrays and returns them; they may not be ready yet."""
        ...


class Checkpoint(Protocol):
    """What a bank needs of a checkpoint; `checkpoint.hf.HFCheckpoint` is one."""

    architecture: Architecture

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """numpy arrays in the checkpoint's dtype, read once; layers counted among those that have experts."""
        ...


class WholeCopy:
    """The transfer of a bank that copies asynchronously: one slice, which waits for the copy."""

    slices = 1

    def __init__(self, copy: Callable[[Key], ExpertWeights], key: Key, nbytes: int):
        self._copy, self._key, self._nbytes = copy, key, nbytes
        self._weights: ExpertWeights | None = None

    def size(self, index: int) -> int:
        """Bytes of the expert."""
        return self._nbytes

    def move(self, index: int) -> None:
        """Starts the copy and waits for it."""
        self._weights = jax.block_until_ready(self._copy(self._key))

    def prepare(self) -> None:
        """Nothing: the copy makes the arrays."""

    def finish(self) -> ExpertWeights:
        """Hands the arrays over: the transfer keeps none, so that their memory is free once the store drops them."""
        weights, self._weights = self._weights, None
        assert weights is not None
        return weights


class HostBank:
    """Every expert as pinned_host arrays in the checkpoint's own dtype."""

    def __init__(self, checkpoint: Checkpoint, device: Any = None):
        """Reads expert after expert, so that never more than one exists twice; `device`: default the first."""
        device = device or jax.devices()[0]
        host = SingleDeviceSharding(device, memory_kind="pinned_host")
        self._device = SingleDeviceSharding(device, memory_kind="device")
        self._experts: dict[Key, ExpertWeights] = {}
        architecture = checkpoint.architecture
        for layer in range(architecture.num_moe_layers):
            for expert in range(architecture.num_experts):
                # Waiting lets go of the numpy arrays before the next are read.
                arrays = jax.block_until_ready(jax.device_put(ExpertWeights(*checkpoint.expert(layer, expert)), host))
                self._experts[layer, expert] = arrays
        self.expert_bytes = self.link_bytes = sum(array.nbytes for array in jax.tree.leaves(self._experts[0, 0]))
        self.total_bytes = self.expert_bytes * len(self._experts)

    def get(self, key: Key) -> ExpertWeights:
        """The pinned_host arrays of one expert."""
        return self._experts[key]

    def copy(self, key: Key) -> ExpertWeights:
        """Starts a real copy into new device arrays; one call for all parts halves the price of each."""
        return to_device(self._experts[key], self._device)

    def start(self, key: Key) -> Transfer:
        """The same copy, for a thread that waits for it."""
        return WholeCopy(self.copy, key, self.link_bytes)

    def close(self) -> None:
        """Nothing to let go of."""

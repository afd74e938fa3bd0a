"""Banks hold every expert off the device. `HostBank`: one pinned_host array per expert part."""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax.sharding import SingleDeviceSharding

from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import ExpertWeights, Key


class Bank(Protocol):
    """What a loader needs of a bank."""

    expert_bytes: int

    def copy(self, key: Key) -> ExpertWeights:
        """Starts a copy of one expert into new device arrays and returns them; they may not be ready yet."""
        ...


class Checkpoint(Protocol):
    """What a bank needs of a checkpoint; `checkpoint.hf.HFCheckpoint` is one."""

    architecture: Architecture

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """numpy arrays in the checkpoint's dtype, read once; layers counted among those that have experts."""
        ...


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
        self.expert_bytes = sum(array.nbytes for array in jax.tree.leaves(self._experts[0, 0]))
        self.total_bytes = self.expert_bytes * len(self._experts)

    def get(self, key: Key) -> ExpertWeights:
        """The pinned_host arrays of one expert."""
        return self._experts[key]

    def copy(self, key: Key) -> ExpertWeights:
        """Starts a real copy into new device arrays; one call for all parts halves the price of each."""
        return jax.device_put(self._experts[key], self._device)

"""Every expert on the device: the reference that offloaded execution must equal bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint.converted import Converted
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.model.decoder import placed
from moe_jax.model.experts import ExpertWeights, Lent, widened


class ResidentExperts:
    """An `ExpertSource` that holds all experts, loaded straight from the checkpoint."""

    def __init__(self, checkpoint: HFCheckpoint | Converted, widen: Any = None):
        """`widen`: a dtype that experts take when they are loaded; None: they keep the checkpoint's."""
        a = checkpoint.architecture

        def layer(index: int) -> list[ExpertWeights]:
            experts = [checkpoint.expert(index, e) for e in range(a.num_experts)]
            parts, tree = jax.tree.flatten(experts if widen is None else [widened(w, widen) for w in experts])
            return jax.tree.unflatten(tree, placed(parts, [part.dtype for part in parts]))

        self._experts = [layer(index) for index in range(a.num_moe_layers)]
        self._all = [Lent(np.arange(a.num_experts, dtype=np.int32), tuple(row)) for row in self._experts]
        self.lends = jax.default_backend() == "cpu"

    def begin_token(self, token: int) -> None:
        pass

    def request(self, layer: int, experts: Sequence[int], by_token: np.ndarray | None = None) -> list[int]:
        return list(experts)

    def ready(self, layer: int, experts: Sequence[int]) -> bool:
        return True

    def borrow(self, layer: int, experts: Sequence[int] | None = None) -> Lent | None:
        if not self.lends:
            return None
        return self._all[layer] if experts is None else Lent(np.array(experts, np.int32), self.take(layer, experts))

    def give_back(self, layer: int, needed: Sequence[int], after: jax.Array) -> None:
        pass

    def take(self, layer: int, experts: Sequence[int]) -> tuple[ExpertWeights, ...]:
        row = self._experts[layer]
        return tuple([row[expert] for expert in experts])

    def settle(self) -> None:
        pass

    def release(self, layer: int, experts: Sequence[int], after: jax.Array) -> None:
        pass

    def offer(self, layer: int, probabilities: np.ndarray) -> None:
        pass

    def wants_prediction(self, cost_s: float) -> bool:
        return False

    def close(self) -> None:
        pass

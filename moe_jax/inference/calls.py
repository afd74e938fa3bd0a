"""How the experts of a decode step are called: which of them share a call, and which calls are made ahead of the host.

All of it depends on the model and the batch alone: how something is calculated must not depend on what is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.inference.grouping import assign
from moe_jax.model.decoder import Stages, committed
from moe_jax.model.experts import ExpertWeights

LARGE_EXPERT = 1 << 18
"""Parameters from which on an expert's computation on a CPU is worth a call of its own: those that are here run while
others are still on their way. Smaller ones share calls, since a call costs more than it could hide; so do all on an
accelerator, which computes with an expert in a fraction of the time of a call (162 us with one of Mixtral-8x7B on an
H100, 5 us with one of Qwen3-30B-A3B, where a call takes 0.2 ms of the host's time)."""
LIKELY = 2
"""So many times K experts are looked for on the device where it is predicted which are the likeliest."""
Call = Callable[[jax.Array, jax.Array, tuple[ExpertWeights, ...]], tuple[jax.Array, jax.Array]]
"""Runs experts: output slots, h and the weights, to the updated slots and what is ready when they have run."""


class ExpertCalls:
    """The calls of a model's experts in decode steps.

    Attributes:
      together: experts that share a call at most.
    """

    def __init__(self, stages: Stages):
        a = stages.architecture
        self._stages, self._top_k, self._num_experts = stages, a.top_k, a.num_experts
        large = sum(map(math.prod, a.expert_shapes().values())) >= LARGE_EXPERT
        self.together = 1 if large and stages.platform == "cpu" else a.top_k
        self._numbers = [committed(np.int32(expert)) for expert in range(a.num_experts)]

    def can_be_ahead(self, batch: int) -> bool:
        """Whether those of the chosen experts that are there can run before the host knows which they are.

        Then the device has work while the host finds out and goes on. Only for one token, and where each expert has a
        call of its own anyway.
        """
        return batch == 1 and self.together == 1

    def likeliest(self, probabilities: np.ndarray) -> list[int]:
        """The experts to look for, where float32 [E] is predicted: a call takes longer for every array it is handed."""
        return probabilities.argsort()[-LIKELY * self._top_k :].tolist()

    def looked_for(self, predicted: bool) -> set[int]:
        """How many experts are looked for at once; `predicted`: there may be predictions."""
        return {self._num_experts} | ({min(LIKELY * self._top_k, self._num_experts)} if predicted else set())

    def ahead(self, chosen: jax.Array, experts: np.ndarray) -> Call:
        """Of one token's experts, `chosen` int32 [1, K], those that are among `experts`, int32 [A], -1 for none."""
        return lambda outputs, h, weights: self._stages.held(outputs, h, chosen, experts, weights)

    def group(self, chosen: Any, active: np.ndarray, group: Sequence[int]) -> Call:
        """Some experts for rows that have `chosen` int32 [B, K]; `active` bool [B]: which rows count."""
        if len(chosen) == 1:
            numbers = tuple([self._numbers[expert] for expert in group])
            return lambda outputs, h, weights: self._stages.chosen(outputs, h, chosen, numbers, weights)
        ids = np.asarray(chosen)
        rows, slots = assign(ids, active, group, len(ids))
        return lambda outputs, h, weights: self._stages.experts(outputs, h, rows, slots, weights)

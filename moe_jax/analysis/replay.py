"""Recorded routing run again without its model: predictors that look at nothing else, and eviction policies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.model.architecture import Routing
from moe_jax.model.experts import Key
from moe_jax.offload.policies import LFU, LRU, Belady, Eviction, LeastStale
from moe_jax.prediction import metrics
from moe_jax.prediction.activation_log import Activations
from moe_jax.prediction.interface import Predictor, Spec
from moe_jax.prediction.memory import Frequency, Random, Repeat

PREDICTORS: tuple[Predictor, ...] = (Repeat(), Frequency(), Random())
WINDOW = 256  # tokens after which predictors begin anew, as in a log of our own


class Routes:
    """Expert ids int [L, T, K] of some texts, in the place of an activation log.

    Neither the tokens nor what a router saw is known.
    """

    def __init__(self, texts: Iterable[np.ndarray], num_experts: int):
        self._ids = [ids[:, t : t + WINDOW] for ids in texts for t in range(0, ids.shape[1], WINDOW)]
        longest, self._experts = max(ids.shape[1] for ids in self._ids), num_experts
        self.windows = SimpleNamespace(tokens=np.zeros((len(self._ids), longest)))

    def read(self, rows: np.ndarray) -> Activations:
        picked, longest = [self._ids[row] for row in rows], self.windows.tokens.shape[1]
        lengths = np.array([ids.shape[1] for ids in picked], np.int32)
        ids = np.stack([np.pad(x, ((0, 0), (0, longest - x.shape[1]), (0, 0))) for x in picked])
        nothing = lambda *shape: np.zeros((*ids.shape[:3], *shape), np.float16)
        gates = nothing(ids.shape[3]) + np.float16(1 / ids.shape[3])
        return Activations(
            nothing(1)[:, 0],
            nothing(1),
            nothing(self._experts),
            ids,
            gates,
            lengths,
            np.zeros((len(ids), longest), np.int32),
        )


def recall(texts: Sequence[np.ndarray], num_experts: int, horizon: int = 8) -> dict[str, metrics.Scores]:
    """Scores of each of PREDICTORS on routing int [L, T, K] of texts."""
    L, _, K = texts[0].shape
    spec = Spec(L, num_experts, 1, 0.0, min(horizon, L), Routing(K))
    log: Any = Routes(texts, num_experts)
    params = lambda predictor: predictor.init(jax.random.key(0), spec, None)
    return {p.name: metrics.evaluate(p, params(p), spec, log, batch=8) for p in PREDICTORS}


def loads(texts: Sequence[np.ndarray], capacity: int, tokens: int) -> dict[str, float]:
    """Experts loaded per token, on demand, by each eviction policy; the first `tokens` of all texts, one after another.

    Args:
      capacity: experts that the device holds, at least K.
    """
    steps = list(itertools.islice(_steps(texts), tokens * len(texts[0])))
    uses = [(layer, expert) for layer, ids in steps for expert in ids]
    policies: dict[str, Eviction] = {"lru": LRU(), "lfu": LFU(), "least_stale": LeastStale(), "belady": Belady(uses)}
    if capacity < len(steps[0][1]):
        raise UserError(f"a budget of {capacity} experts does not hold the {len(steps[0][1])} that one layer needs")
    count = len(steps) / len(texts[0])
    return {name: _misses(policy, steps, capacity) / count for name, policy in policies.items()}


def _steps(texts: Sequence[np.ndarray]) -> Iterator[tuple[int, list[int]]]:
    for ids in texts:
        for t in range(ids.shape[1]):
            yield from enumerate(ids[:, t].tolist())


def _misses(policy: Eviction, steps: Sequence[tuple[int, list[int]]], capacity: int) -> int:
    state, resident, misses = policy.init(), dict[Key, None](), 0
    never = lambda candidates: np.zeros(len(candidates))
    for layer, ids in steps:
        needed = [(layer, expert) for expert in ids]
        for key in needed:
            if key not in resident:
                if len(resident) == capacity:
                    free = {other: None for other in resident if other not in needed}
                    del resident[policy.victim(state, free, never)]
                resident[key] = None
                misses += 1
            state = policy.on_use(state, key)
    return misses

"""What the machine allows: compute alone (C), the transfers that LRU on demand needs alone (T), and the bounds."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import jax
import numpy as np

from moe_jax.inference.engine import DecodeState, Engine, Record
from moe_jax.inference.grouping import arities, assign, unique_in_order
from moe_jax.model.experts import ExpertWeights


def replay(
    engine: Engine, record: Record, weights_of: Callable[[int, int], ExpertWeights], capacity: int, steps: int = 16
) -> float:
    """C: median seconds per decode step of the same executables with recorded routing and no host logic in between.

    Args:
      record: of a run with at least one decode step.
      weights_of: (layer, expert) -> resident weights.
      capacity: cache positions S of that run.
      steps: how many of the last recorded steps are replayed (after one to warm up).
    """
    stages, layers = engine.stages, engine.architecture.num_moe_layers
    batch = record.ids[0].shape[0]
    state = DecodeState(stages.kv_cache(batch, capacity), stages.rope(capacity), record.lengths[0], record.active[0])
    chosen = range(max(0, len(record.active) - steps), len(record.active))
    plans = [[_plan(engine, record, step, layer) for layer in range(layers)] for step in chosen]
    times = []
    for step, plan in zip([chosen[0], *chosen], [plans[0], *plans], strict=True):
        lengths, active = record.lengths[step], record.active[step]
        positions = np.where(active, lengths, capacity).astype(np.int32)[:, None]
        started = time.perf_counter()
        x = stages.embed(engine.dense, np.zeros((batch, 1), np.int32))
        for index, layer in engine.numbered:
            if layer is None:
                x = stages.dense_layer(index, engine.dense, state.rope, x, positions, state.kv)
                continue
            routed = stages.route(index, engine.dense, state.rope, x, positions, state.kv)
            outputs = routed.outputs
            for experts, rows, slots in plan[layer]:
                weights = tuple([weights_of(layer, expert) for expert in experts])
                outputs, _ = stages.experts(outputs, routed.h, rows, slots, weights)
            x = stages.combine(routed.residual, outputs, routed.gates, x)
        stages.head(engine.dense, x, np.zeros(batch, np.int32)).block_until_ready()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def _plan(engine: Engine, record: Record, step: int, layer: int) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    ids, active = record.ids[step * engine.architecture.num_moe_layers + layer], record.active[step]
    needed, calls = unique_in_order(ids, active), []
    for size in arities(len(needed), engine.together):
        group, needed = needed[:size], needed[size:]
        calls.append((group, *assign(ids, active, group, ids.shape[0])))
    return calls


def lru_loads(record: Record, num_layers: int, experts_in_budget: int) -> int:
    """Experts that a cache of this size under LRU, without prefetching, loads during the decode steps of `record`."""
    resident: OrderedDict[tuple[int, int], None] = OrderedDict()

    def use(layer: int, needed: Sequence[int]) -> int:
        misses = 0
        for key in [(layer, expert) for expert in needed]:
            misses += key not in resident
            resident[key] = None
            resident.move_to_end(key)
            if len(resident) > experts_in_budget:
                resident.popitem(last=False)
        return misses

    for layer, needed in enumerate(record.prefill_needed):
        use(layer % num_layers, needed)
    complete = record.needed[: len(record.active) * num_layers]
    return sum(use(i % num_layers, needed) for i, needed in enumerate(complete))


def predictor_seconds(engine: Engine, state_batch: int, repeats: int = 20) -> float | None:
    """Seconds of one predictor call alone, times the layers of a token; None without a predictor."""
    if engine.predictor is None:
        return None
    call = engine.example_prediction(state_batch)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * engine.architecture.num_moe_layers


def overlap_share(compute_s: float, transfer_s: float, measured_s: float) -> float | None:
    """(C + T - measured) / min(C, T): 1 is perfect overlap, 0 none; None when there is too little to overlap."""
    least = min(compute_s, transfer_s)
    if least < 0.05 * (compute_s + transfer_s):
        return None
    return (compute_s + transfer_s - measured_s) / least

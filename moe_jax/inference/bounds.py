"""What the machine allows: compute alone (C), the transfers that LRU on demand needs alone (T), and the bounds."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import jax
import numpy as np

from moe_jax.inference.calls import Call
from moe_jax.inference.engine import Engine
from moe_jax.inference.grouping import groups, unique_in_order
from moe_jax.inference.state import DecodeState, Record
from moe_jax.model.decoder import Stream, committed
from moe_jax.model.experts import ExpertWeights, Key


class Replay:
    """The executables of recorded decode steps, without host logic between them and with nothing to wait for.

    Args:
      record: of a run with at least one decode step. Of several batches the last that has one is replayed.
      weights_of: (layer, expert) -> resident weights.
      steps: how many of its last steps are replayed; None: all.
    """

    def __init__(
        self,
        engine: Engine,
        record: Record,
        weights_of: Callable[[int, int], ExpertWeights],
        steps: int | None = None,
    ):
        self._engine, self._record, self._weights_of = engine, record, weights_of
        count = len(record.active)
        first, self._capacity = next(batch for batch in reversed(record.batches) if batch.first < count)
        self.steps = range(max(first, count - steps) if steps else first, count)
        layers = range(engine.architecture.num_moe_layers)
        self._plans = {step: [_plan(engine, record, step, layer) for layer in layers] for step in self.steps}

    def run(self) -> list[float]:
        """Seconds of each step, after one to warm up that is not among them."""
        stages, capacity, first = self._engine.stages, self._capacity, self.steps[0]
        lengths, active = self._record.lengths[first], self._record.active[first]
        kv = stages.kv_cache(len(active), capacity)
        state = DecodeState(kv, stages.rope(capacity), lengths, active)
        return [self._step(state, step, len(active)) for step in (first, *self.steps)][1:]

    def _step(self, state: DecodeState, step: int, batch: int) -> float:
        engine, stages, plan = self._engine, self._engine.stages, self._plans[step]
        lengths, active = self._record.lengths[step], self._record.active[step]
        tokens, at = committed(np.zeros(batch, np.int32)), np.where(active, lengths, self._capacity).astype(np.int32)
        started = time.perf_counter()
        x, positions = stages.begin(engine.dense, tokens, at)
        for index, layer in engine.numbered:
            if layer is None:
                x = stages.dense_layer(index, engine.dense, state.rope, x, positions, state.kv)
                continue
            routed = stages.route(index, engine.dense, state.rope, x, positions, state.kv)
            outputs = routed.outputs
            for experts, call in plan[layer]:
                weights = tuple([self._weights_of(layer, expert) for expert in experts])
                outputs, _ = call(outputs, routed.h, weights)
            x = Stream(routed.residual, outputs, routed.gates)
        stages.head(engine.dense, x).block_until_ready()
        return time.perf_counter() - started


def replay(engine: Engine, record: Record, weights_of: Callable[[int, int], ExpertWeights], steps: int = 16) -> float:
    """C: median seconds per decode step of a `Replay` of the last `steps` steps."""
    return float(np.median(Replay(engine, record, weights_of, steps).run()))


def _plan(engine: Engine, record: Record, step: int, layer: int) -> list[tuple[Sequence[int], Call]]:
    """The calls of a layer's experts, each with its experts."""
    ids, active = record.ids[step * engine.architecture.num_moe_layers + layer], record.active[step]
    chosen, needed = committed(ids), unique_in_order(ids, active)
    if engine.source.lends and engine.calls.can_be_ahead(len(ids)):
        experts = np.arange(engine.architecture.num_experts, dtype=np.int32)
        return [(experts.tolist(), engine.calls.ahead(chosen, experts))]
    return [(group, engine.calls.group(chosen, active, group)) for group in groups(needed, engine.calls.together)]


def lru_misses(record: Record, num_layers: int, experts_in_budget: int) -> list[Key]:
    """What a cache of this size under LRU, without prefetching, loads during the decode steps of `record`, in order."""
    resident: OrderedDict[Key, None] = OrderedDict()
    misses: list[Key] = []
    for key, step in uses_in_order(record, num_layers):
        if key not in resident and step >= 0:
            misses.append(key)
        resident[key] = None
        resident.move_to_end(key)
        if len(resident) > experts_in_budget:
            resident.popitem(last=False)
    return misses


def belady_loads(record: Record, num_layers: int, experts_in_budget: int, sees: int | None = None) -> int:
    """The fewest loads, of any kind, with which the decode steps of `record` can run in a cache of this size.

    Belady's MIN (IBM Systems Journal 5(2), 1966): what is needed last leaves, which may be what has just been used. The
    experts of a layer count one after another, so that no schedule whatever, prefetching or not, has fewer.

    `sees`: only what the layers of so many tokens need, from the one that runs, is known, exactly; the rest leaves
    first, the least recently used of it before others. None: everything is known; 0: this is LRU.
    """
    uses = uses_in_order(record, num_layers)
    later: dict[Key, int] = {}
    next_use = [0] * len(uses)
    for at in range(len(uses) - 1, -1, -1):
        key, _ = uses[at]
        next_use[at] = later.get(key, len(uses) + at)
        later[key] = at
    resident: OrderedDict[Key, int] = OrderedDict()  # the least recently used first
    loads = ahead = 0
    reach = len(uses) if sees is None else sees * num_layers
    where = [(layer, step) for (layer, _), step in uses]
    layers = [*itertools.accumulate((a != b for a, b in itertools.pairwise(where)), initial=0)]  # that have run before
    for at, (key, step) in enumerate(uses):
        loads += key not in resident and step >= 0
        resident[key] = next_use[at]
        resident.move_to_end(key)
        while ahead < len(uses) and layers[ahead] - layers[at] < reach:
            ahead += 1  # the first use that is not known
        if len(resident) > experts_in_budget:
            unknown = None if sees is None else next((key for key, use in resident.items() if use >= ahead), None)
            del resident[unknown or max(resident, key=resident.__getitem__)]
    return loads


def uses_in_order(record: Record, num_layers: int) -> list[tuple[Key, int]]:
    """Every use of an expert in order, and its decode step, -1 in a prefill; an incomplete step is left out."""
    ends = [*(batch.first for batch in record.batches[1:]), len(record.active)]
    uses: list[tuple[Key, int]] = []
    for batch, ((first, _), end) in enumerate(zip(record.batches, ends, strict=True)):
        for layer, needed in enumerate(record.prefill_needed[batch * num_layers : (batch + 1) * num_layers]):
            uses += [((layer, expert), -1) for expert in needed]
        for i in range(first * num_layers, end * num_layers):
            uses += [((i % num_layers, expert), i // num_layers) for expert in record.needed[i]]
    return uses


def predictor_seconds(engine: Engine, state_batch: int, repeats: int = 20) -> float | None:
    """Seconds of one predictor call alone, times the layers of a token; None without a predictor."""
    if engine.forecast is None:
        return None
    call = engine.forecast.example(state_batch)
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

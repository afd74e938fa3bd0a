"""The numbers of a generation, as design.md defines them; null where one does not apply."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.inference import bounds
from moe_jax.inference.engine import Engine
from moe_jax.inference.generate import Generation
from moe_jax.inference.grouping import unique_in_order
from moe_jax.inference.state import Record
from moe_jax.model.experts import ExpertWeights

PERCENTILES = {"median": 50, "p90": 90, "p99": 99}


def measure(generation: Generation, link_gbps: float = 0.0, with_bounds: bool = True) -> dict[str, Any]:
    """All numbers of what `generation` has done so far. Replays some steps to find the bounds (about a second).

    Args:
      link_gbps: the simulated link of the run, or 0.
      with_bounds: measure the bounds too; otherwise they are null.
    """
    engine, timing, record = generation.engine, generation.timing, generation.record
    steps = np.array(timing.step_s)
    tokens = sum(len(output.token_ids) for output in generation.outputs)
    offloaded: Any = engine.source if hasattr(engine.source, "trace") else None
    resident = offloaded.resident() if offloaded else []  # and nothing is loaded meanwhile
    predicted = record.active and any(row[0] >= 0 for row in record.guessed)
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the bounds take theirs
    summary = generation.trace.summary() if offloaded else {}
    result = {
        "compile_s": generation.compile_s,
        "ttft_s": float(np.median(timing.ttft_s)) if timing.ttft_s else None,
        "tpot_s": {name: float(np.percentile(steps, q)) if len(steps) else None for name, q in PERCENTILES.items()},
        "tokens_per_s": tokens / timing.total_s if timing.total_s else None,
        "needed": summary.get("needed") or dict.fromkeys(("cached", "prefetched", "late", "missed")),
        "hit_rate": summary.get("hit_rate"),
        "recall": recall(record, engine.architecture.num_moe_layers),
        "ready_recall": summary.get("ready_recall"),
        "departed": departed(record),
        "bytes_per_token": summary.get("bytes_per_token")
        or dict.fromkeys(("demand", "speculative_used", "speculative_wasted")),
        "stall_s_per_token": summary.get("stall_s_per_token"),
        "predictor_s_per_token": bounds.predictor_seconds(engine, len(record.active[0])) if predicted else None,
        "bound_overlap_s": None,
        "bound_serial_s": None,
        "overlap_share": None,
        "peak_device_cache_bytes": summary.get("peak_device_cache_bytes"),
        "device_budget_bytes": offloaded.store.budget_bytes if offloaded else None,
        "peak_rss_bytes": peak_rss_bytes,
    }
    if len(steps) and with_bounds and resident:  # interrupted, the store may hold nothing yet to compute with
        compute, transfer = _compute_and_transfer(engine, generation, link_gbps, resident)
        result["bound_overlap_s"] = max(compute, transfer)
        result["bound_serial_s"] = compute + transfer
        result["overlap_share"] = bounds.overlap_share(compute, transfer, float(np.median(steps)))
    return result


def recall(record: Record, num_layers: int) -> float | None:
    """Recall of the prediction one layer ahead, not wrapped: top-U of its ranking against the U experts needed."""
    found = []
    for i in range(1, len(record.active) * num_layers):
        guessed = record.guessed[i - 1]
        if i % num_layers and guessed[0] >= 0:
            needed = record.needed[i]
            if record.routed:  # what ran may be the prediction itself
                needed = unique_in_order(record.routed[i], record.active[i // num_layers])
            found.append(len({*guessed[: len(needed)].tolist()} & {*needed}) / len(needed))
    return float(np.mean(found)) if found else None


def departed(record: Record) -> float | None:
    """Share of (token, layer) whose experts were not those of the true router; None in exact mode."""
    if not record.routed or not record.active:
        return None
    layers = len(record.routed) // len(record.active)  # an interrupted step adds less than one of each
    different = [
        (np.sort(ran, axis=1) != np.sort(true, axis=1)).any(1)[record.active[i // layers]]
        for i, (ran, true) in enumerate(zip(record.ids, record.routed, strict=False))
        if i < len(record.active) * layers
    ]
    return float(np.concatenate(different).mean())


def _compute_and_transfer(
    engine: Engine, generation: Generation, link_gbps: float, resident: Sequence[ExpertWeights]
) -> tuple[float, float]:
    """C and T, seconds per decode step; `resident`: what is in the store."""
    source: Any = engine.source
    record, layers = generation.record, engine.architecture.num_moe_layers
    # Which weights does not matter to the time; those of the store are spread over the experts that ran.
    pick = lambda layer, expert: resident[(layer * engine.architecture.num_experts + expert) % len(resident)]
    compute = bounds.replay(engine, record, pick)
    loads = len(bounds.lru_misses(record, layers, source.store.capacity))
    rate = source.link_bytes_per_s()
    transfer = loads * source.bank.link_bytes / len(record.active) / min(rate, link_gbps * 1e9 or rate)
    return compute, transfer

"""Speed of several ways to run one model, interleaved in one process: the only comparison that means something here.

Absolute times drift on shared machines; ratios of runs that alternate hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.inference import bounds, metrics
from moe_jax.inference.engine import Engine
from moe_jax.inference.generate import Generation
from moe_jax.inference.resident import ResidentExperts
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.session import Model
from moe_jax.offload.source import OffloadedExperts
from moe_jax.prediction import predictors
from moe_jax.trace import Trace

RESIDENT, BASELINE = "resident", "none"


@dataclasses.dataclass
class Mode:
    """One way to run the model: `resident`, or offloaded with the predictor of that name ("none": LRU on demand)."""

    name: str
    engine: Engine
    step_s: list[float] = dataclasses.field(default_factory=list)
    run_s: list[float] = dataclasses.field(default_factory=list)  # median step of each run
    last: Generation | None = None


def compare(
    model: Model, names: Sequence[str], prompts: Sequence[str], new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Runs every mode `repeats` times in turn, greedily, and checks that all give the same tokens.

    Args:
      model: loaded with tier "host"; its budget and bank serve all offloaded modes.
      names: modes, see `Mode`.

    Returns:
      A row per mode: TPOT, the numbers of design.md, the ratio to LRU on demand with its bootstrap interval, and for
      `resident` the host overhead per layer (TPOT minus the replay of the same executables).
    """
    if not isinstance(model.engine.source, OffloadedExperts):
        raise UserError("benchmark.py compares with offloading: use --config.offload.tier=host")
    modes = [_mode(model, name) for name in names]
    tokens: dict[str, list[list[int]]] = {}
    for turn in range(repeats + 1):
        for mode in modes:
            if isinstance(mode.engine.source, OffloadedExperts):
                mode.engine.source.trace = Trace()
            original, model.engine = model.engine, mode.engine
            generation = model.start(prompts, new_tokens, Sampling())
            model.engine = original
            for _ in generation:
                pass
            tokens[mode.name] = [output.token_ids for output in generation.outputs]
            if turn:  # the first turn warms up
                mode.step_s += generation.timing.step_s
                mode.run_s.append(float(np.median(generation.timing.step_s)))
            mode.last = generation
    if any(found != tokens[modes[0].name] for found in tokens.values()):
        raise AssertionError(f"modes disagree about the text: {tokens}")
    baseline = next((mode.run_s for mode in modes if mode.name == BASELINE), None)
    rows = [_row(mode, model, baseline) for mode in modes]
    for mode in modes:
        if mode.engine is not model.engine:
            mode.engine.source.close()
    return rows


def _mode(model: Model, name: str) -> Mode:
    base, source = model.engine, model.engine.source
    assert isinstance(source, OffloadedExperts)
    if name == RESIDENT:
        return Mode(name, Engine(base.stages, base.dense, ResidentExperts(model.checkpoint), None, base.prefill_chunk))
    a = model.checkpoint.architecture
    own = OffloadedExperts(source.bank, a, source.store.budget_bytes, link_gbps=model.config.offload.link_gbps)
    prefetch = model.config.prefetch
    directory = model.predictor_directory()
    predictor = predictors.load(name, min(prefetch.horizon, a.num_moe_layers), directory, a, base.dense)
    return Mode(name, Engine(base.stages, base.dense, own, predictor, base.prefill_chunk))


def _row(mode: Mode, model: Model, baseline: list[float] | None) -> dict[str, Any]:
    generation = mode.last
    assert generation is not None
    row: dict[str, Any] = {"mode": mode.name}
    row.update(metrics.measure(generation, 0.0, model.config.offload.link_gbps))
    steps = np.array(mode.step_s)
    row["tpot_s"] = {name: float(np.percentile(steps, q)) for name, q in metrics.PERCENTILES.items()}
    row["host_overhead_s_per_layer"] = None
    if mode.name == RESIDENT:
        source, layers = mode.engine.source, mode.engine.architecture.num_moe_layers
        weights = lambda layer, expert: source.take(layer, [expert])[0]
        compute = bounds.replay(mode.engine, generation.record, weights, generation.capacity, steps=64)
        row["replay_s"] = compute
        row["host_overhead_s_per_layer"] = (row["tpot_s"]["median"] - compute) / layers
    row["ratio_to_lru"] = _ratio(mode.run_s, baseline) if baseline else None
    return row


def _ratio(run_s: list[float], baseline: list[float], draws: int = 2000) -> dict[str, float]:
    """Median of the paired ratios to LRU on demand, with a 95% bootstrap interval."""
    ratios = np.array(run_s) / np.array(baseline)
    resampled = np.random.default_rng(0).choice(ratios, (draws, len(ratios)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}

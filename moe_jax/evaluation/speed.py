"""Speed of several ways to run one model, interleaved in one process: the only comparison that means something here.

Absolute times drift on shared machines; ratios of runs that alternate hold. A turn runs one request once in every mode,
and measures what the machine gives for it: C, T and both at once. All figures per token are means over decode steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.evaluation import paired, reader
from moe_jax.evaluation.lab import Lab, Measured, Request
from moe_jax.evaluation.modes import BASELINE, Mode
from moe_jax.inference import bounds, metrics
from moe_jax.model.experts import Key

WARM_UP_TOKENS = 8
SEEING = (1, 2, 4, 8, 16)
"""Tokens ahead, of which a report tells what it would help to know them."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the machine gives for one request, seconds per decode step.

    Attributes:
      compute_s: C, a replay of the executables.
      transfer_s: T, an independent reader of what LRU on demand loads.
      together_s: both at once, with nothing that one could wait for in the other.
    """

    compute_s: float
    transfer_s: float
    together_s: float


def compare(
    lab: Lab,
    modes: Sequence[Mode],
    requests: Sequence[Request],
    budget_bytes: int,
    turns: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Runs every mode once a turn, in an order that rotates; turn t takes request t modulo their number.

    Args:
      requests: of one batch size and prompt length, see `Lab.rehearse`.
      progress: told how many runs are done; the bounds of a turn are one, too.

    Returns:
      What `table` documents.
    """
    capacity = budget_bytes // lab.expert_bytes
    move, finish = lab.mover()
    try:
        misses = [bounds.lru_misses(request.record, lab.architecture.num_moe_layers, capacity) for request in requests]
        depth = reader.best_depth(move, misses[0]) if misses[0] else 1
        measured: dict[Mode, list[Measured]] = {mode: [] for mode in modes}
        limits: list[Limits] = []
        for turn in range(turns):
            request = requests[turn % len(requests)]
            for done, mode in enumerate(paired.rotated([*modes, None], turn), turn * (len(modes) + 1) + 1):
                if mode is None:
                    limits.append(_limits(lab, request, move, misses[turn % len(requests)], depth))
                else:
                    measured[mode].append(lab.run(mode, request, _budget(lab, mode, budget_bytes)))
                progress(done)
    finally:
        finish()
    return table(lab, requests, budget_bytes, measured, limits, depth)


def _budget(lab: Lab, mode: Mode, budget_bytes: int) -> int:
    return mode.experts * lab.bytes_of(mode) if mode.experts else budget_bytes


def _limits(lab: Lab, request: Request, move: Callable[[Key], None], misses: list[Key], depth: int) -> Limits:
    steps, replay = len(request.record.active), lab.replay(request)
    compute = sum(replay.run())
    transfer = reader.Reading(move, misses, depth).seconds()
    reading = reader.Reading(move, misses, depth)
    beside = sum(replay.run())
    return Limits(compute / steps, transfer / steps, max(beside, reading.seconds()) / steps)


def table(
    lab: Lab,
    requests: Sequence[Request],
    budget_bytes: int,
    measured: dict[Mode, list[Measured]],
    limits: Sequence[Limits],
    depth: int,
) -> dict[str, Any]:
    """The figures of one budget, batch and prompt length, ready for JSON. Null: does not apply.

    `bounds`: C, T and what follows from them (design.md, "Numbers, defined once"); `machine_s` is both at once, and
    `machine_overlap_share` the share of the overlap that this is; `reader_*` describe the independent reader;
    `*_loads_per_token` what LRU on demand must load, and Belady's optimum; `loads_per_token_seeing` is what must be
    loaded if the experts of only so many tokens ahead are known, but those exactly.

    `modes`: one row each. `ratio_to_lru` is of means, paired by turn; `overlap_of_machine` is the mode's overlap over
    that of the machine, null where the latter's interval reaches down to none; `loads_to_belady` counts every load,
    speculative and wasted ones too; `wasted_of_idle` is the link time of speculation that was never used, over the link
    time that LRU on demand leaves idle.
    """
    turns, layers = len(limits), lab.architecture.num_moe_layers
    used = [requests[turn % len(requests)] for turn in range(turns)]
    capacity = budget_bytes // lab.expert_bytes
    steps = [len(request.record.active) for request in used]
    lru = [len(bounds.lru_misses(request.record, layers, capacity)) for request in used]
    compute, transfer, together = (
        np.array([getattr(limit, name) for limit in limits]) for name in ("compute_s", "transfer_s", "together_s")
    )
    overlap = lambda times: lambda t: bounds.overlap_share(compute[t].mean(), transfer[t].mean(), times[t].mean())
    every = np.arange(turns)
    rate = sum(lru) * lab.link_bytes / float(transfer @ steps) if sum(lru) else None
    shared = {
        "compute_s": float(compute.mean()),
        "transfer_s": float(transfer.mean()),
        "bound_overlap_s": float(max(compute.mean(), transfer.mean())),
        "bound_serial_s": float(compute.mean() + transfer.mean()),
        "machine_s": float(together.mean()),
        "machine_overlap_share": overlap(together)(every),
        "reader_depth": depth,
        "reader_bytes_per_s": rate,
        "lru_loads_per_token": sum(lru) / sum(steps),
        "belady_loads_per_token": sum(bounds.belady_loads(r.record, layers, capacity) for r in used) / sum(steps),
        "loads_per_token_seeing": {
            str(tokens): sum(bounds.belady_loads(r.record, layers, capacity, tokens) for r in used) / sum(steps)
            for tokens in SEEING
        },
        "every_expert_resident": lab.resident,  # while C was measured; otherwise the budget's experts stood for all
    }
    baseline = next((runs for mode, runs in measured.items() if mode.name == BASELINE), None)
    hidden = lambda times: lambda t: float((compute + transfer - times)[t].mean())
    overlaps = paired.interval(hidden(together), turns)["low"] > 0  # the machine does; otherwise nothing to divide by
    rows = []
    for mode, runs in measured.items():
        row = _row(lab, mode, runs, used, budget_bytes)
        times = np.array([run.mean_s for run in runs])
        row["ratio_to_lru"] = paired.ratio(times, [run.mean_s for run in baseline]) if baseline else None
        moves = runs[0].summary is not None and not mode.upcast  # C is that of the configured upcast
        row["overlap_share"] = overlap(times)(every) if moves else None
        row["overlap_of_machine"] = None
        if row["overlap_share"] is not None and overlaps:
            quotient = lambda t, times=times: hidden(times)(t) / hidden(together)(t)
            row["overlap_of_machine"] = paired.interval(quotient, turns)
        row["wasted_of_idle"] = None
        if moves and baseline and rate:
            idle = np.average([run.mean_s for run in baseline], weights=steps) - transfer.mean()
            wasted = row["bytes_per_token"]["speculative_wasted"] / rate
            row["wasted_of_idle"] = float(wasted / idle) if idle > 0 else None
        rows.append(row)
    batch, length = len(requests[0].prompts), max(len(prompt) for prompt in requests[0].prompts)
    return {
        "budget_bytes": budget_bytes,
        "budget_share": capacity / (layers * lab.architecture.num_experts),
        "experts_in_budget": capacity,
        "expert_bytes": lab.expert_bytes,
        "batch": batch,
        "prompt_length": length,
        "decode_steps": steps,
        "turns": turns,
        "bounds": shared,
        "limits_by_turn": [dataclasses.asdict(limit) for limit in limits],
        "modes": rows,
    }


def _row(lab: Lab, mode: Mode, runs: Sequence[Measured], used: Sequence[Request], budget_bytes: int) -> dict[str, Any]:
    steps = [len(run.step_s) for run in runs]
    every = np.concatenate([run.step_s for run in runs])
    row: dict[str, Any] = {
        **dataclasses.asdict(mode),
        "tpot_s": {
            "mean": float(every.mean()),
            **{name: float(np.percentile(every, q)) for name, q in metrics.PERCENTILES.items()},
        },
        "tpot_by_turn_s": [run.mean_s for run in runs],
        "ttft_s": float(np.median([run.ttft_s for run in runs])),
        "recall": None if runs[0].recall is None else float(np.mean([run.recall for run in runs])),  # pyright: ignore
        "predictor_s_per_token": lab.predictor_seconds(mode, len(used[0].record.active[0])),
        "device_budget_bytes": None,
        "peak_device_cache_bytes": None,
        "loads_per_token": None,
        "loads_to_belady": None,
    }
    found = [run.summary for run in runs if run.summary is not None]
    names = ("needed", "hit_rate", "ready_recall", "bytes_per_token", "stall_s_per_token")
    row |= {name: paired.mean_of(found, steps, name) if found else None for name in names}
    if found:
        budget = _budget(lab, mode, budget_bytes)
        optimum = sum(
            bounds.belady_loads(r.record, lab.architecture.num_moe_layers, budget // lab.bytes_of(mode)) for r in used
        )
        loads = sum(run.loads or 0 for run in runs)
        row["device_budget_bytes"] = budget
        row["peak_device_cache_bytes"] = max(summary["peak_device_cache_bytes"] for summary in found)
        row["loads_per_token"] = loads / sum(steps)
        row["loads_to_belady"] = loads / optimum if optimum else None
    return row

"""A trace told to a person: where each layer found its experts, what it waited for, what was moved in vain."""

from __future__ import annotations

from collections.abc import Iterable

from moe_jax.trace import OUTCOMES, Load, Step, Trace


def markdown(trace: Trace) -> str:
    """A Markdown report of the decode steps of a trace: the totals, and a row per layer.

    Shares are of the experts that the layer needed; bytes and milliseconds are per decode step.
    """
    summary = trace.summary()
    tokens = summary["tokens"]
    if not tokens:
        return "# Trace\n\nNo decode step was recorded.\n"
    steps = [step for step in trace.steps() if step.token >= 0]
    loads = [load for load in trace.loads if load.token >= 0]
    lines = [
        "# Trace",
        "",
        f"{tokens} decode steps; hit rate {_percent(summary['hit_rate'])},"
        f" ready recall {_percent(summary['ready_recall'])},"
        f" waited {1e3 * summary['stall_s_per_token']:.2f} ms per step;"
        f" at most {summary['peak_device_cache_bytes'] / 1e6:.2f} MB of experts on the device.",
        "",
        f"| layer | {' | '.join(OUTCOMES)} | waited, ms | on demand, kB | speculated and used, kB | wasted, kB |",
        "|" + "---|" * 9,
    ]
    for layer in sorted({step.layer for step in steps}):
        own = [step for step in steps if step.layer == layer]
        lines.append(f"| {layer} | {_row(own, [load for load in loads if load.layer == layer], tokens)} |")
    lines.append(f"| all | {_row(steps, loads, tokens)} |")
    return "\n".join(lines) + "\n"


def _row(steps: Iterable[Step], loads: Iterable[Load], tokens: int) -> str:
    outcomes = [outcome for step in steps for outcome in step.outcomes]
    shares = [_percent(outcomes.count(outcome) / len(outcomes)) for outcome in OUTCOMES]
    loads = list(loads)
    moved = [
        sum(load.bytes for load in loads if load.cause == "demand"),
        sum(load.bytes for load in loads if load.cause == "speculative" and load.used),
        sum(load.bytes for load in loads if load.cause == "speculative" and not load.used),
    ]
    stall = f"{1e3 * sum(step.stall_s for step in steps) / tokens:.3f}"
    return " | ".join([*shares, stall, *(f"{size / tokens / 1e3:.1f}" for size in moved)])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"

"""What a race gave: a document for JSON, and a table of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from moe_jax.evaluation.peers.race import OURS, Result


def document(results: Sequence[Result], cap_bytes: int, model_bytes: int) -> dict[str, Any]:
    """Every figure. `fastest` is each engine's best setting under the cap, and `ratio` its time over ours; the peers'
    best setting counts whether its tokens agree or not, ours must agree in all."""
    rows = []
    for result in results:
        metrics = result.metrics or {}
        rows.append(
            {
                "engine": result.contender.engine,
                "setting": result.contender.setting,
                "capped": result.contender.capped,
                "tpot_s": result.tpot_s,
                "runs": [dataclasses.asdict(run) for run in result.runs],
                "same_tokens": result.same_tokens,
                "tokens": len(result.runs[0].token_ids) if result.runs else None,
                "peak_bytes": result.peak_bytes or None,
                "failure": result.failure or None,
                **{name: metrics.get(name) for name in ("bound_overlap_s", "bound_serial_s", "device_budget_bytes")},
            }
        )
    fastest: dict[str, dict[str, Any]] = {}
    for row in rows:
        agrees = row["engine"] != OURS or row["same_tokens"] == row["tokens"]
        if row["capped"] and row["tpot_s"] and agrees:
            before = fastest.get(row["engine"])
            if before is None or row["tpot_s"] < before["tpot_s"]:
                fastest[row["engine"]] = {"setting": row["setting"], "tpot_s": row["tpot_s"]}
    for engine in fastest.values():
        engine["ratio"] = engine["tpot_s"] / fastest[OURS]["tpot_s"] if OURS in fastest else None
    return {"cap_bytes": cap_bytes, "model_bytes": model_bytes, "rows": rows, "fastest": fastest}


def text(document: dict[str, Any]) -> str:
    """The table."""
    cap, size = document["cap_bytes"], document["model_bytes"]
    lines = [
        f"model of {size / 1e6:.0f} MB on disk; each alone under a memory cap of {cap / 1e6:.0f} MB"
        f" ({100 * cap / size:.0f}%), page cache cold and within the cap; ms per output token, mean",
        f"{'engine':13} {'setting':44} {'TPOT':>10} {'first token':>12} {'peak MB':>8} {'same tokens':>12}",
    ]
    for row in document["rows"]:
        head = f"{row['engine']:13} {row['setting']:44}"
        if row["failure"]:
            lines.append(f"{head} {row['failure']}")
            continue
        first = row["runs"][-1]["ttft_s"]
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        same = f"{row['same_tokens']}/{row['tokens']}"
        bound = row["bound_overlap_s"]
        tail = "" if bound is None else f"   max(C, T) {1e3 * bound:.1f}, C + T {1e3 * row['bound_serial_s']:.1f}"
        lines.append(f"{head} {1e3 * row['tpot_s']:10.1f} {1e3 * first:12.0f} {peak:>8} {same:>12}{tail}")
    for engine, best in document["fastest"].items():
        if engine != OURS and best["ratio"]:
            lines.append(f"{engine} at its best ({best['setting']}) takes {best['ratio']:.1f} times as long as {OURS}")
    return "\n".join(lines)

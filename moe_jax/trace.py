"""The schema of what happened: per token and layer what was needed, found, loaded and waited for.

Recording appends small tuples; every number is worked out afterwards. Definitions are those of design.md, "Numbers,
defined once". Nothing here knows the engine, so reports and replays can read traces alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_jax.errors import UserError

Outcome = Literal["cached", "prefetched", "late", "missed"]
Cause = Literal["demand", "speculative"]
OUTCOMES: tuple[Outcome, ...] = ("cached", "prefetched", "late", "missed")
SCHEMA = 1


@dataclasses.dataclass(slots=True)
class Load:
    """One copy of one expert to the device. Times are `time.perf_counter()` seconds; `t_done` None: not completed."""

    layer: int
    expert: int
    cause: Cause
    bytes: int
    token: int
    t_issue: float
    t_done: float | None = None
    used: bool = False  # computed with at least once before its eviction


@dataclasses.dataclass(frozen=True)
class Step:
    """What one layer needed in one decode step (`token` >= 0), or in the prefill (`token` -1)."""

    token: int
    layer: int
    needed: tuple[int, ...]  # distinct experts in router order: enough to replay the step
    outcomes: tuple[Outcome, ...]  # one for each needed expert
    stall_s: float  # time blocked waiting for these experts
    predicted: np.ndarray | None = None  # float32 [H, E]: P(needed) offered after this step for the layers ahead


class Trace:
    """Records one run. The decode thread writes steps; whoever copies writes loads (under the loader's lock)."""

    def __init__(self, keep_predictions: bool = False):
        """`keep_predictions`: keep what was predicted too, for `Step.predicted` (H * E floats each)."""
        self.loads: list[Load] = []
        self.token = -1
        self.peak_bytes = 0
        self._keep_predictions = keep_predictions
        self._decode_tokens = 0
        self._steps: list[tuple[int, int, tuple[int, ...], tuple[Outcome, ...]]] = []
        self._stalls: list[tuple[int, float]] = []
        self._predicted: dict[int, np.ndarray] = {}

    def begin_token(self, token: int) -> None:
        """A decode step (`token` >= 0) or the prefill (-1) starts."""
        self.token = token
        self._decode_tokens += token >= 0

    def step(self, layer: int, needed: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """One layer's needs, and what became of each."""
        self._steps.append((self.token, layer, tuple(needed), tuple(outcomes)))

    def stall(self, seconds: float) -> None:
        """Time blocked for the experts of the latest step."""
        self._stalls.append((len(self._steps) - 1, seconds))

    def predict(self, probabilities: np.ndarray) -> None:
        """Predictions float32 [H, E] made at the latest step. The array is kept, not copied."""
        if self._keep_predictions:
            self._predicted[len(self._steps) - 1] = probabilities

    def steps(self) -> list[Step]:
        """Everything recorded so far, in order."""
        stalls = [0.0] * len(self._steps)
        for index, seconds in self._stalls:
            if index >= 0:
                stalls[index] += seconds
        return [Step(*step, stalls[i], self._predicted.get(i)) for i, step in enumerate(self._steps)]

    def summary(self, decode_only: bool = True) -> dict[str, Any]:
        """The numbers of design.md; one that does not apply is None.

        Args:
          decode_only: leave the prefill out. Per token means per decode step, whatever the batch; without
            `decode_only` the whole prefill counts as one more.

        A load counts where it was issued. Speculation never used, also what still waits for its use, is wasted.
        """
        kept = [step for step in self.steps() if step.token >= 0 or not decode_only]
        loads = [load for load in self.loads if load.token >= 0 or not decode_only]
        tokens = self._decode_tokens + (not decode_only and any(step.token < 0 for step in kept))
        counts = dict.fromkeys(OUTCOMES, 0)
        for step in kept:
            for outcome in step.outcomes:
                counts[outcome] += 1
        needed = sum(counts.values())
        moved = {"demand": 0, "speculative_used": 0, "speculative_wasted": 0}
        for load in loads:
            kind = "demand" if load.cause == "demand" else "speculative_used" if load.used else "speculative_wasted"
            moved[kind] += load.bytes
        hits, not_cached = counts["cached"] + counts["prefetched"], needed - counts["cached"]
        return {
            "tokens": tokens,
            "needed": {name: count / needed if needed else None for name, count in counts.items()},
            "hit_rate": hits / needed if needed else None,
            "ready_recall": counts["prefetched"] / not_cached if not_cached else None,
            "bytes_per_token": {kind: size / tokens if tokens else None for kind, size in moved.items()},
            "stall_s_per_token": sum(step.stall_s for step in kept) / tokens if tokens else None,
            "peak_device_cache_bytes": self.peak_bytes,
        }

    def save(self, path: str | Path) -> None:
        """Writes JSON lines: a header, then every step, then every load."""
        header = {"schema": SCHEMA, "peak_bytes": self.peak_bytes, "decode_tokens": self._decode_tokens}
        with Path(path).open("w") as file:
            file.write(json.dumps({"kind": "trace", **header}) + "\n")
            for step in self.steps():
                predicted = None if step.predicted is None else np.asarray(step.predicted).tolist()
                file.write(json.dumps({"kind": "step", **vars(step), "predicted": predicted}) + "\n")
            for load in self.loads:
                file.write(json.dumps({"kind": "load", **dataclasses.asdict(load)}) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Reads what `save` wrote.

        Raises:
          UserError: the file is missing, or not a trace of this schema.
        """
        try:
            lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read trace {path}: {error}") from None
        if not lines or lines[0].get("kind") != "trace" or lines[0].get("schema") != SCHEMA:
            raise UserError(f"{path} is not a trace of schema {SCHEMA}; record one with --trace={path}")
        trace = cls(keep_predictions=True)
        trace.peak_bytes, trace._decode_tokens = lines[0]["peak_bytes"], lines[0]["decode_tokens"]
        for line in lines[1:]:
            if line.pop("kind") == "load":
                trace.loads.append(Load(**line))
                continue
            trace.token = line["token"]
            trace.step(line["layer"], line["needed"], line["outcomes"])
            if line["stall_s"]:
                trace.stall(line["stall_s"])
            if line["predicted"] is not None:
                trace.predict(np.asarray(line["predicted"], np.float32))
        return trace

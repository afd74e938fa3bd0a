"""The schema of what happened: per token and layer what was needed, found, loaded and waited for.

Definitions are those of design.md, "Numbers, defined once". Nothing here knows the engine, so reports and replays can
read traces alone.
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
FEW = 256
"""Loads that a trace without details keeps anyway."""


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
    gone: bool = dataclasses.field(default=False, compare=False)  # evicted or given up: nothing changes any more


@dataclasses.dataclass(frozen=True)
class Step:
    """What one layer needed in one decode step (`token` >= 0), or in the prefill (`token` -1)."""

    token: int
    layer: int
    needed: tuple[int, ...]  # distinct experts in router order: enough to replay the step
    outcomes: tuple[Outcome, ...]  # one for each needed expert
    stall_s: float  # time blocked waiting for these experts
    predicted: np.ndarray | None = None  # float32 [H, E]: P(needed) offered after this step for the layers ahead


@dataclasses.dataclass
class _Totals:
    """Of the prefills, or of the decode steps."""

    outcomes: dict[Outcome, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    stall_s: float = 0.0
    # Of loads that are gone and forgotten.
    loads: int = 0
    demand: int = 0  # bytes, as the two that follow
    speculative_used: int = 0
    speculative_wasted: int = 0

    def add(self, load: Load) -> None:
        """Speculation never used, also what still waits for its use, is wasted."""
        self.loads += 1
        if load.cause == "demand":
            self.demand += load.bytes
        elif load.used:
            self.speculative_used += load.bytes
        else:
            self.speculative_wasted += load.bytes


class Trace:
    """Records one run. The decode thread writes steps; whoever copies writes loads (under the loader's lock).

    Attributes:
      loads: without `details` only those that are not gone, and some that are.
    """

    def __init__(self, keep_predictions: bool = False, details: bool = True):
        """
        Args:
          keep_predictions: keep what was predicted too, for `Step.predicted` (H * E floats each).
          details: keep every step and load. Without them there is the summary alone, and memory does not grow.
        """
        self.loads: list[Load] = []
        self.token = -1
        self.peak_bytes = 0
        self._keep_predictions, self._details = keep_predictions, details
        self._decode_tokens = 0
        self._totals = {False: _Totals(), True: _Totals()}  # by whether a token is decoded
        self._fold_at = FEW  # loads
        self._steps: list[tuple[int, int, tuple[int, ...], tuple[Outcome, ...]]] = []
        self._stalls: list[tuple[int, float]] = []
        self._predicted: dict[int, np.ndarray] = {}

    def begin_token(self, token: int) -> None:
        """A decode step (`token` >= 0) or the prefill (-1) starts."""
        self.token = token
        self._decode_tokens += token >= 0

    def step(self, layer: int, needed: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """One layer's needs, and what became of each."""
        totals = self._totals[self.token >= 0].outcomes
        for outcome in outcomes:
            totals[outcome] += 1
        if self._details:
            self._steps.append((self.token, layer, tuple(needed), tuple(outcomes)))

    def load(self, load: Load) -> None:
        """A copy begins."""
        self.loads.append(load)
        if not self._details and len(self.loads) >= self._fold_at:
            kept = []
            for each in self.loads:
                if each.gone:
                    self._totals[each.token >= 0].add(each)
                else:
                    kept.append(each)
            self.loads, self._fold_at = kept, 2 * len(kept) + FEW

    def stall(self, seconds: float) -> None:
        """Time blocked for the experts of the latest step."""
        self._totals[self.token >= 0].stall_s += seconds
        if self._details:
            self._stalls.append((len(self._steps) - 1, seconds))

    def predict(self, probabilities: np.ndarray) -> None:
        """Predictions float32 [H, E] made at the latest step. The array is kept, not copied."""
        if self._keep_predictions and self._details:
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
        kinds = (True,) if decode_only else (False, True)
        totals = {kind: dataclasses.replace(self._totals[kind]) for kind in kinds}
        for load in self.loads:
            if (kind := load.token >= 0) in totals:
                totals[kind].add(load)
        total = lambda name: sum(getattr(t, name) for t in totals.values())
        counts: dict[str, int] = {name: sum(t.outcomes[name] for t in totals.values()) for name in OUTCOMES}
        tokens = self._decode_tokens + (not decode_only and any(self._totals[False].outcomes.values()))
        needed = sum(counts.values())
        moved = {name: total(name) for name in ("demand", "speculative_used", "speculative_wasted")}
        hits, not_cached = counts["cached"] + counts["prefetched"], needed - counts["cached"]
        return {
            "tokens": tokens,
            "needed": {name: count / needed if needed else None for name, count in counts.items()},
            "hit_rate": hits / needed if needed else None,
            "ready_recall": counts["prefetched"] / not_cached if not_cached else None,
            "loads": total("loads"),
            "bytes_per_token": {kind: size / tokens if tokens else None for kind, size in moved.items()},
            "stall_s_per_token": total("stall_s") / tokens if tokens else None,
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
                fields = {name: value for name, value in dataclasses.asdict(load).items() if name != "gone"}
                file.write(json.dumps({"kind": "load", **fields}) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Reads what `save` wrote.

        Raises:
          UserError: the file is missing, or not a trace of this schema.
        """
        try:
            lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
            return cls._of(lines)
        except OSError as error:
            raise UserError(f"cannot read trace {path}: {error}") from None
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):  # no JSON, or other JSON
            raise UserError(f"{path} is not a trace of schema {SCHEMA}; record one with --trace={path}") from None

    @classmethod
    def _of(cls, lines: list[dict[str, Any]]) -> Trace:
        if lines[0]["kind"] != "trace" or lines[0]["schema"] != SCHEMA:
            raise ValueError("another schema")
        trace = cls(keep_predictions=True)
        trace.peak_bytes, trace._decode_tokens = lines[0]["peak_bytes"], lines[0]["decode_tokens"]
        for line in lines[1:]:
            if line.pop("kind") == "load":
                trace.load(Load(**line))
                continue
            trace.token = line["token"]
            trace.step(line["layer"], line["needed"], line["outcomes"])
            if line["stall_s"]:
                trace.stall(line["stall_s"])
            if line["predicted"] is not None:
                trace.predict(np.asarray(line["predicted"], np.float32))
        return trace

"""What a running batch carries from step to step, and what is recorded of a run."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.inference.forecast import Forecast, Said
from moe_jax.inference.rows import Lists, Rows
from moe_jax.model.decoder import KVCache, Routed, committed

MEMORY_TOKENS = 256
"""Tokens that a predictor is told of afterwards when it was not asked for a while."""


class Entered(NamedTuple):
    """A step that has been dispatched up to the first choice of experts: see `Engine.enter`."""

    tokens: jax.Array  # int32 [B]
    active: np.ndarray  # bool [B], as it was then
    positions: jax.Array  # int32 [B, 1]
    forecast: Forecast | None  # who predicts in this step, if anyone
    routed: Routed  # of the first layer that has experts
    predictor: Any  # the predictor's state
    said: Said | None  # what it has said already, if anything


@dataclasses.dataclass
class DecodeState:
    """Everything a running batch carries from step to step."""

    kv: KVCache
    rope: jax.Array  # [S, 2, H / 2]
    lengths: np.ndarray  # int32 [B]: positions filled; the next token of a row goes to this position
    active: np.ndarray  # bool [B]: rows still generating
    predictor: Any = None  # the predictor's own state
    memory: Any = None  # the execution mode's own state
    unseen: deque[np.ndarray] = dataclasses.field(default_factory=lambda: deque(maxlen=MEMORY_TOKENS))
    entered: Entered | None = None
    step: int = 0
    _copied: tuple[np.ndarray, jax.Array] | None = None  # `active` as it was, and on the device

    @property
    def capacity(self) -> int:
        return self.kv[0][0].shape[2]

    def device_active(self) -> jax.Array:
        """`active` on the device, to which it is copied when it has changed: a copy takes longer than a call."""
        if self._copied is None or (self._copied[0] != self.active).any():
            self._copied = self.active.copy(), committed(self.active.copy())
        return self._copied[1]


class Batch(NamedTuple):
    """Prompts that decode together."""

    first: int  # decode step of the record
    capacity: int  # cache positions


@dataclasses.dataclass
class Record:
    """Routing of a run, as the decode loop saw it; decode lists have one entry per step and expert layer.

    When a step was interrupted its layers stand at the end of the lists, beyond the `len(active)` complete steps.
    """

    batches: list[Batch] = dataclasses.field(default_factory=list)  # one for each prefill, in order
    prefill_needed: list[list[int]] = dataclasses.field(default_factory=list)  # per prefill and layer
    needed: Lists = dataclasses.field(default_factory=Lists)
    ids: Rows = dataclasses.field(default_factory=Rows)  # int32 [B, K]
    routed: Rows = dataclasses.field(default_factory=Rows)  # the router's own ids; empty: those that ran
    # Experts of the layer after, int16, the likeliest first, as many as may be needed; -1 where nothing was predicted.
    guessed: Rows = dataclasses.field(default_factory=Rows)
    active: Rows = dataclasses.field(default_factory=Rows)  # bool [B], per step
    lengths: Rows = dataclasses.field(default_factory=Rows)  # int32 [B], per step
    said: list[np.ndarray | None] = dataclasses.field(default_factory=list)  # float32 [E], by the step that runs

    def end_step(self, state: DecodeState, routed: Sequence[Any]) -> None:
        """A step is complete; `routed`: what the router of each layer chose, if that is not what ran."""
        self.lengths.append(state.lengths)
        for ids in routed:
            self.routed.append(ids)
        count = self.ids[-1].size
        known = [row for row in self.said if row is not None]
        # All layers' at once, while the device ends the step.
        ranked = iter(np.argsort(-np.stack(known), kind="stable")[:, :count].astype(np.int16) if known else ())
        width = min(count, len(known[0])) if known else 1
        nothing = np.full(width, -1, np.int16)
        for row in self.said:
            self.guessed.append(nothing if row is None else next(ranked))
        self.said.clear()
        self.active.append(state.active)  # last: from now on the step is complete

"""Eviction policies: small pure things, testable from a table. `config.POLICIES` names them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np

from moe_jax.errors import UserError
from moe_jax.model.experts import Key
from moe_jax.trace import Step

Expected = Callable[[Collection[Key]], np.ndarray]
"""When the candidates are expected to be needed next: float [len], in their order, in layers from the one that runs."""


class Eviction(Protocol):
    """Which of the resident experts to give up.

    A state passed to `on_use` is consumed, as a donated array is: go on with the one returned. `on_use` hears of every
    expert that a layer needs, resident or not, and of every speculative load, in an order that is independent of
    timing; the state may hence know experts that are not resident.
    """

    def init(self) -> Any:
        """The state before any use."""
        ...

    def on_use(self, state: Any, key: Key, needed: bool = True) -> Any:
        """The state after `key` was needed, or (`needed` False) speculatively loaded."""
        ...

    def victim(self, state: Any, candidates: Collection[Key], expected: Expected) -> Key:
        """The member of `candidates` (not empty; membership tests are fast) to evict."""
        ...


class LRU:
    """Evicts what was used least recently; what was never used goes first. The state is a dict in order of use."""

    def init(self) -> dict[Key, None]:
        """No uses."""
        return {}

    def on_use(self, state: dict[Key, None], key: Key, needed: bool = True) -> dict[Key, None]:
        """Moves `key` to the recent end."""
        state.pop(key, None)
        state[key] = None
        return state

    def victim(self, state: dict[Key, None], candidates: Collection[Key], expected: Expected) -> Key:
        """The least recent candidate."""
        never_used = next((key for key in candidates if key not in state), None)
        return never_used or next(key for key in state if key in candidates)


class LFU:
    """Evicts what was used least often, counts fading by half every `HALF_LIFE` uses; the least recent on ties."""

    HALF_LIFE = 4096  # uses of any expert: old texts should not keep experts for ever

    def init(self) -> dict[str, Any]:
        """No uses."""
        return {"clock": 0, "count": {}, "last": {}}

    def on_use(self, state: dict[str, Any], key: Key, needed: bool = True) -> dict[str, Any]:
        """Counts one use; a speculative load is none yet."""
        if not needed:
            return state
        state["clock"] += 1
        if state["clock"] % self.HALF_LIFE == 0:
            state["count"] = {other: count / 2 for other, count in state["count"].items()}
        state["count"][key] = state["count"].get(key, 0) + 1
        state["last"][key] = state["clock"]
        return state

    def victim(self, state: dict[str, Any], candidates: Collection[Key], expected: Expected) -> Key:
        """The candidate with the fewest uses."""
        count, last = state["count"], state["last"]
        return min(candidates, key=lambda key: (count.get(key, 0), last.get(key, 0)))


class LeastStale:
    """Least-Stale eviction (SpecMD, arXiv 2602.03921): first what was not used since its layer last ran, oldest first.

    Layers run in turn, so what a layer did not use the last time it ran (stale) goes first; among the rest, the
    experts of the layer that has just run are the farthest from their next use.
    """

    def init(self) -> dict[str, Any]:
        """No uses."""
        return {"clock": 0, "last": {}, "round": {}}

    def on_use(self, state: dict[str, Any], key: Key, needed: bool = True) -> dict[str, Any]:
        """A layer's round starts with the first need of it after a need of another layer."""
        state["clock"] += 1
        layer = key[0]
        if needed and state.get("layer") != layer:
            state["layer"] = layer
            state["round"][layer] = state["clock"]
        state["last"][key] = state["clock"]
        return state

    def victim(self, state: dict[str, Any], candidates: Collection[Key], expected: Expected) -> Key:
        """The stale candidate used longest ago, else one of the layer that ran last."""
        last, started = state["last"], state["round"]

        def order(key: Key) -> tuple[bool, int, int]:
            used = last.get(key, 0)
            stale = used < started.get(key[0], 0)
            return not stale, 0 if stale else -started.get(key[0], 0), used

        return min(candidates, key=order)


class Predicted:
    """Evicts what is expected to be needed last, by the predictor and by how often an expert is used at all."""

    def init(self) -> None:
        """It has no state of its own: what is expected is the loader's."""
        return None

    def on_use(self, state: None, key: Key, needed: bool = True) -> None:
        """Nothing to remember."""
        return None

    def victim(self, state: None, candidates: Collection[Key], expected: Expected) -> Key:
        """The candidate of the longest expected time to its next use."""
        return next(itertools.islice(candidates, int(np.argmax(expected(candidates))), None))


class Belady:
    """Evicts what is needed farthest in the future of a recorded run (Belady, 1966): a bound, no policy.

    The run must be the recorded one again; where it departs, the policy goes by the record as far as it is.
    """

    def __init__(self, uses: Sequence[Key], strict: bool = False):
        """
        Args:
          uses: every (layer, expert) that the recorded run needed, in order (`Trace.steps()`).
          strict: refuse a run that departs before the record ends.
        """
        self._uses, self._strict = uses, strict
        self._at: dict[Key, list[int]] = {}
        for index, key in enumerate(uses):
            self._at.setdefault(key, []).append(index)

    def init(self) -> int:
        """Uses seen so far."""
        return 0

    @classmethod
    def of(cls, steps: Sequence[Step], num_layers: int, num_experts: int, top_k: int) -> Belady:
        """The run of a trace and no other, of a model of so many layers, experts and active ones.

        Raises:
          UserError: the trace is of another model; later, from `on_use`: of another run.
        """
        uses = [(step.layer, expert) for step in steps for expert in step.needed]
        layers, fewest = {layer for layer, _ in uses}, min((len(step.needed) for step in steps), default=0)
        if layers != set(range(num_layers)) or max(expert for _, expert in uses) >= num_experts or fewest < top_k:
            raise UserError(
                f"--config.offload.trace is of another model than one of {num_layers} layers, {num_experts} experts and"
                f" {top_k} active: record this run with --config.offload.policy=lru --trace=FILE"
            )
        return cls(uses, strict=True)

    def on_use(self, state: int, key: Key, needed: bool = True) -> int:
        """Goes to the use of the record that this one is: the next one of `key`, if the record has any left.

        Raises:
          UserError: strict, and the record has another use here.
        """
        if self._strict and needed and state < len(self._uses) and self._uses[state] != key:
            raise UserError(
                "this run is not that of --config.offload.trace (another prompt, sampling, seed or model), which policy"
                " belady needs: record it with --config.offload.policy=lru --trace=FILE"
            )
        at = self._at.get(key, []) if needed else []
        index = bisect.bisect_left(at, state)
        return at[index] + 1 if index < len(at) else state

    def victim(self, state: int, candidates: Collection[Key], expected: Expected) -> Key:
        """The candidate whose next use is last, or never."""

        def following(key: Key) -> float:
            at = self._at.get(key, [])
            index = bisect.bisect_left(at, state)
            return at[index] if index < len(at) else float("inf")

        return max(candidates, key=following)

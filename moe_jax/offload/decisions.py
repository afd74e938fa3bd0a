"""`Decisions`: which expert moves next, and which one makes room for it. Who may be evicted:

    for an expert that `take` blocks on       anything unpinned that this `take` does not want; of the experts that the
                                              current request still waits to take, only if there is nothing else
    for any other demanded expert             unpinned, and not among those still to be taken
    for a speculated one                      the same, idle, and less likely to be needed than it

Where layers have equal shares of the budget, only experts of the same layer. Of these the policy chooses.
"""

from __future__ import annotations

import time
import traceback

import numpy as np

from moe_jax.errors import LoadError
from moe_jax.model.experts import ExpertWeights, Key
from moe_jax.offload.keys import KeySet
from moe_jax.offload.outlook import Outlook
from moe_jax.offload.store import ArrayStore
from moe_jax.trace import Cause, Load, Outcome, Trace


class Decisions:
    """What is demanded, expected and there, and what follows from that. Moves nothing, and is not locked: `Loader` is.

    Attributes:
      trace: where loads are recorded; may be replaced between tokens.
      store: the books; read them, do not write.
    """

    def __init__(self, store: ArrayStore, outlook: Outlook):
        self.trace = Trace()
        self.store = store
        self._outlook = outlook
        self._starved = False  # a demand waits until something is released
        self._demand: dict[Key, None] = {}  # demanded, not issued, oldest first
        self._pending: dict[Key, None] = {}  # of the current request, not taken yet
        self._wanted: dict[Key, None] = {}  # what a `take` blocks on
        self._failures: dict[Key, LoadError] = {}
        self._layer = self._need = 0  # the layer that runs, and the number of its experts
        self._copy_s = 0.0  # moving average of what a load costs the layer that waits for it; 0: unknown

    def _classify(self, key: Key) -> Outcome:
        entry = self.store.resident.get(key)
        if entry is not None:
            return "prefetched" if entry.load.cause == "speculative" and not entry.load.used else "cached"
        load = self.store.in_flight.get(key)
        if load is not None:
            return "late" if load.cause == "speculative" else "missed"
        self._demand[key] = None
        return "missed"

    def _spared(self, key: Key, outcome: Outcome, now: float) -> float:
        """Seconds of waiting for `key`, "prefetched" or "late", that speculation has spared the layer that needs it."""
        if outcome == "late":
            return min(now - self.store.in_flight[key].t_issue, self._copy_s)
        return self._copy_s

    def _next_demand(self) -> Key | None:
        for key in self._wanted:
            if not self.store.holds(key) and key not in self._failures:
                return key
        return next(iter(self._demand), None)

    def _evictable(self, pending_too: bool, key: Key | None = None) -> np.ndarray:
        """What may go, bool [L, E]; for `key`, if given: where its layer has its share, only experts of that layer."""
        table = self.store.unpinned.copy()
        for other in self._wanted:
            table[other] = False
        if not pending_too:
            for other in self._pending:
                table[other] = False
        if key is not None and self.store.layer_full(key[0]):
            own = table[key[0]].copy()
            table[:] = False
            table[key[0]] = own
        return table

    def _choose(self, table: np.ndarray) -> Key:
        return self.store.victim(KeySet(table), lambda _: self._outlook.expected(self._layer, table))

    def _victim_for(self, key: Key) -> Key | None:
        """What a demanded expert may evict, by the rules above."""
        candidates = self._evictable(False, key)
        if not candidates.any() and key in self._wanted:
            candidates = self._evictable(True, key)
        return self._choose(candidates) if candidates.any() else None

    def _speculation(self) -> Key | None:
        """The expert most worth a speculative copy, with room made for it, if there is one."""
        # Where a layer's experts fill the store, the next layer's take the place of what is loaded for later ones.
        reach = 1 if self.store.capacity <= self._need else None
        best = self._outlook.best(self._layer, reach)
        if best is None:
            return None
        key, probability = best
        self.store.settle()
        if not self.store.has_room(key):
            # Only idle ones: waiting for a computation would hold up a demand that comes meanwhile.
            candidates = self.store.idle(self._outlook.below(self._evictable(False, key), probability))
            if not candidates.any():
                return None
            self._evict(self._choose(candidates))
        return key

    def _evict(self, key: Key) -> None:
        self.store.evict(key)
        self._outlook.hold(key, False)
        if key in self._pending:
            self._demand[key] = None
            self._starved = True

    def _start(self, key: Key, cause: Cause, moved: int) -> Load:
        """Books a copy, of which `moved` bytes count from now on; the caller issues it."""
        load = Load(*key, cause, moved, self.trace.token, time.perf_counter())
        self.store.begin(key, load)
        self._demand.pop(key, None)
        self._outlook.hold(key, True)
        if cause == "speculative":
            self.store.use(key, needed=False)
        self.trace.load(load)
        self.trace.peak_bytes = max(self.trace.peak_bytes, self.store.used_bytes)
        return load

    def _arrive(self, key: Key, weights: ExpertWeights, took: float | None = None) -> None:
        """`took`: seconds that its layer would wait for it on demand, where that is not the time since its issue."""
        load = self.store.in_flight[key]
        self.store.commit(key, weights)
        self._noted(load, took)

    def _noted(self, load: Load, took: float | None) -> None:
        load.t_done = time.perf_counter()
        took = load.t_done - load.t_issue if took is None else took
        self._copy_s = 0.9 * self._copy_s + 0.1 * took if self._copy_s else max(took, 1e-9)  # it may have cost nothing

    def _fail(self, key: Key, error: Exception) -> None:
        """A demanded expert's failure waits for its `take`; a speculated one's only ends the speculation."""
        # The frames of the traceback may hold the arrays; their memory must be free when the bytes stop counting.
        traceback.clear_frames(error.__traceback__)
        self.store.abort(key)
        self._outlook.hold(key, False)
        self._outlook.forget(key)
        if key in self._pending or key in self._wanted:
            self._failures[key] = load_error(key, error)
            self._failures[key].__cause__ = error

    def _raise_failures(self) -> None:
        for key in self._wanted:
            if key in self._failures:
                raise self._failures.pop(key)


def load_error(key: Key, error: Exception) -> LoadError:
    """What the user is told of a copy that failed."""
    return LoadError(f"loading layer {key[0]} expert {key[1]} failed: {error}")

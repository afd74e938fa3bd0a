"""`Loader`: decides what moves when. What is common to both ways of issuing copies.

Demand comes before speculation; speculation happens only where no demand is queued. Nothing issued can be cancelled or
overtaken, so at most one speculative copy, or slice of one, is in flight. Who may be evicted:

    for an expert that `take` blocks on       anything unpinned that this `take` does not want; of the experts that the
                                              current request still waits to take, only if there is nothing else
    for any other demanded expert             unpinned, and not among those still to be taken
    for a speculated one                      the same, idle, and less likely to be needed than it

Where layers have equal shares of the budget, only experts of the same layer. Of these the policy chooses.

What a `take` wants and what is pinned together never exceed the budget (checked), every copy ends, and computations end
by themselves: so each `take` ends too, at every budget.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.errors import LoadError
from moe_jax.model.experts import ExpertWeights, Key, Lent
from moe_jax.offload.benefit import Benefit
from moe_jax.offload.keys import KeySet
from moe_jax.offload.outlook import Outlook
from moe_jax.offload.store import ArrayStore
from moe_jax.trace import Cause, Load, Outcome, Trace


class Loader:
    """Base of `ThreadLoader` and `InlineLoader`. One decode thread calls it; that thread may be interrupted anywhere.

    Attributes:
      trace: where loads are recorded; may be replaced between tokens.
      store: the books; read them, do not write.
      benefit: what speculation has gained.
      lends: whether `borrow` may give anything.
    """

    lends = True

    def __init__(
        self,
        bank: Any,
        store: ArrayStore,
        outlook: Outlook,
        *,
        link_gbps: float = 0.0,
        delay: Callable[[Key], float] | None = None,
    ):
        """
        Args:
          bank: a `Bank`, for `InlineLoader` an `AsyncBank`.
          link_gbps: a simulated link of so many 10^9 bytes per second; 0: as fast as it goes.
          delay: seconds that the arrival of an expert is held up (tests).
        """
        self.trace = Trace()
        self.store = store
        self.benefit = Benefit()
        self._bank, self._outlook, self._delay = bank, outlook, delay
        self._link_s = bank.link_bytes / (link_gbps * 1e9) if link_gbps else 0.0
        self._lock = threading.Lock()
        self._closed = False
        self._starved = False  # a demand waits until something is released
        self._demand: dict[Key, None] = {}  # demanded, not issued, oldest first
        self._pending: dict[Key, None] = {}  # of the current request, not taken yet
        self._wanted: dict[Key, None] = {}  # what a `take` blocks on
        self._failures: dict[Key, LoadError] = {}
        self._layer = self._need = 0  # the layer that runs, and the number of its experts
        self._copy_s = 0.0  # moving average; 0: unknown
        self._last_request = 0.0
        self._busy = 1.0  # moving average of the share of the time that the link is busy

    # Called by the decode thread.

    def request(self, layer: int, keys: Sequence[Key], by_token: np.ndarray | None = None) -> list[Outcome]:
        """`layer` needs these distinct keys; misses are queued at once. Replaces the request before.

        `by_token`: of a prompt, the experts that each of its tokens uses, bool [T, E].
        """
        with self._lock:
            self._check_usable()
            self._poll()
            now = time.perf_counter()
            self._layer = layer
            self._pending = dict.fromkeys(keys)
            self._need = len(keys)
            self._demand.clear()
            self._failures.clear()
            outcomes: list[Outcome] = [self._classify(key) for key in keys]
            if self._demand:
                self._rouse()
            self._clock(now)
            self._outlook.passed(layer, [expert for _, expert in keys], by_token)
            for key, outcome in zip(keys, outcomes, strict=True):
                if outcome == "prefetched" or outcome == "late":
                    self.benefit.hid(self._spared(key, outcome, now))
                self.store.use(key)
            if self._demand:
                self._kick()
        return outcomes

    def take(self, keys: Sequence[Key]) -> tuple[tuple[ExpertWeights, ...], float]:
        """Blocks until all keys are on the device, and pins them; returns them and the seconds blocked.

        Raises:
          LoadError: a copy failed.
          RuntimeError: more is taken than the budget holds beside what is pinned, or the loader is closed.
        """
        stall = 0.0
        with self._lock:
            resident = self.store.resident
            if self._closed or not all(key in resident for key in keys):
                self._check_usable()
                began = time.perf_counter()
                self._wanted = dict.fromkeys(keys)
                try:
                    self._check_possible()
                    self._obtain()
                finally:
                    self._wanted = {}
                stall = time.perf_counter() - began
                self.benefit.stalled(stall)
            for key in keys:
                self._pending.pop(key, None)
            return tuple([self.store.pin(key) for key in keys]), stall

    def borrow(self, layer: int, experts: Sequence[int] | None) -> Lent | None:
        """What there is of these experts, which stays; what of it is needed is not known yet."""
        with self._lock:
            return None if self._closed else self.store.lend(layer, experts)

    def give_back(self, layer: int, needed: Sequence[Key], after: jax.Array) -> None:
        """Ends what `borrow` began, after the `request`; those that were `needed` then count as taken and released."""
        with self._lock:
            if self._closed:
                return
            for key in needed:
                self._pending.pop(key, None)
                self.store.resident[key].load.used = True
            self.store.give_back(layer, after)
            self._let_go()

    def release(self, keys: Sequence[Key], after: jax.Array) -> None:
        """Unpins what was taken; it is in use until `after` is ready."""
        with self._lock:
            if self._closed:
                return
            for key in keys:
                self.store.unpin(key, after)
            self._let_go()

    def offer(self, layer: int, probabilities: np.ndarray) -> None:
        """Predictions float32 [H, E] for the layers after `layer`."""
        with self._lock:
            self._outlook.offer(layer, probabilities)
            if self._worth_a_look():
                self._kick()

    def unpin_all(self) -> None:
        """Forgets the pins of a step that was interrupted between `take` and `release`."""
        with self._lock:
            self.store.unpin_all()

    def make_room(self, count: int) -> None:
        """Evicts experts until `count` more would fit; for between tokens, when nothing computes.

        Drops what an interrupted step left pinned, demanded or still to be taken: it would never leave.
        """
        while True:
            with self._lock:
                self.store.unpin_all()
                self._pending.clear()
                self._demand.clear()
                self._outlook.clear()  # nothing speculated may take the room
                self._poll()
                self.store.settle()
                if (self.store.capacity - count) * self.store.expert_bytes >= self.store.used_bytes:
                    return
                if self._give_up():
                    continue
                if (candidates := self._evictable(True)).any():
                    self._evict(self._choose(candidates))
                    continue
            time.sleep(1e-4)  # a last copy is in flight

    def close(self) -> None:
        """Stops, and drops every expert. May be called again."""
        with self._lock:
            self._closed = True
            self.store.clear()

    # What the two ways of issuing differ in. All are called under the lock.

    def _kick(self) -> None:
        """There may be something to issue."""
        raise NotImplementedError

    def _rouse(self) -> None:
        """There will be something to issue once the lock is free. To wake a thread takes a while."""

    def _obtain(self) -> None:
        """Blocks until everything in `_wanted` is resident, or raises."""
        raise NotImplementedError

    def _poll(self) -> None:
        """Notices copies that have arrived, where nobody else does."""

    def _worth_a_look(self) -> bool:
        """Whether a new prediction can give work. Waking a thread for nothing costs the decode thread its turn."""
        return self._outlook.any_likely()

    def _give_up(self) -> bool:
        """Drops a speculative load that has begun and waits for its turn; whether there was one."""
        return False

    def _busy_s(self, now: float) -> float | None:
        """Seconds that the link was busy since the last call, where that is known."""
        return None

    # Shared parts, under the lock.

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("the expert source is closed")

    def _check_possible(self) -> None:
        pinned = len(self.store.resident) - int(np.count_nonzero(self.store.unpinned))
        others = pinned - sum(key in self.store.resident and not self.store.unpinned[key] for key in self._wanted)
        if others + len(self._wanted) > self.store.per_layer:
            raise RuntimeError(
                f"{len(self._wanted)} experts are taken while {others} are not released;"
                f" the device budget holds {self.store.per_layer}"
            )

    def _clock(self, now: float) -> None:
        """Moving average of how busy the link is, from one request to the next."""
        busy_s = self._busy_s(now)
        if self._last_request and busy_s is not None:
            self._busy += 0.02 * (min(busy_s / (now - self._last_request), 1.0) - self._busy)
            self._outlook.busy(self._busy)
        self._last_request = now

    def _let_go(self) -> None:
        """Something is pinned no longer."""
        if self._starved:
            self._kick()
        self._outlook.catch_up()  # the layer computes meanwhile

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
        self.trace.loads.append(load)
        self.trace.peak_bytes = max(self.trace.peak_bytes, self.store.used_bytes)
        return load

    def _arrive(self, key: Key, weights: ExpertWeights, took: float | None = None) -> None:
        """`took`: seconds that the link was busy with it, where that is not the time since its issue."""
        load = self.store.in_flight[key]
        self.store.commit(key, weights)
        load.t_done = time.perf_counter()
        took = load.t_done - load.t_issue if took is None else took
        self._copy_s = took if not self._copy_s else 0.9 * self._copy_s + 0.1 * took

    def _fail(self, key: Key, error: Exception) -> None:
        """A demanded expert's failure waits for its `take`; a speculated one's only ends the speculation."""
        # The frames of the traceback may hold the arrays; their memory must be free when the bytes stop counting.
        traceback.clear_frames(error.__traceback__)
        self.store.abort(key)
        self._outlook.hold(key, False)
        self._outlook.forget(key)
        if key in self._pending or key in self._wanted:
            failure = LoadError(f"loading layer {key[0]} expert {key[1]} failed: {error}")
            failure.__cause__ = error
            self._failures[key] = failure

    def _raise_failures(self) -> None:
        for key in self._wanted:
            if key in self._failures:
                raise self._failures.pop(key)


def wait_for(uses: Sequence[jax.Array]) -> None:
    """Blocks until computations have ended."""
    for use in uses:
        try:
            use.block_until_ready()
        except Exception:  # one that failed has ended too; whoever reads its result is told
            continue

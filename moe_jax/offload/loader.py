"""`Loader`: decides what moves when. What is common to both ways of issuing copies.

Demand comes before speculation; speculation happens only where no demand is queued. Nothing issued can be cancelled or
overtaken, so at most one speculative copy, or slice of one, is in flight. Who is evicted: see `decisions.py`.

What a `take` wants and what is pinned together never exceed the budget (checked), every copy ends, and computations end
by themselves: so each `take` ends too, at every budget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.model.experts import ExpertWeights, Key, Lent
from moe_jax.offload.benefit import Benefit
from moe_jax.offload.decisions import Decisions
from moe_jax.offload.outlook import Outlook
from moe_jax.offload.store import ArrayStore
from moe_jax.trace import Outcome


class Loader(Decisions):
    """Base of `ThreadLoader` and `InlineLoader`. One decode thread calls it; that thread may be interrupted anywhere.

    Attributes:
      benefit: what speculation has gained.
      lends: whether `borrow` may give anything.
    """

    lends: bool

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
        super().__init__(store, outlook)
        self.benefit = Benefit()
        self._bank, self._delay = bank, delay
        self._link_s = bank.link_bytes / (link_gbps * 1e9) if link_gbps else 0.0
        self._lock = threading.Lock()
        self._closed = False
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

    def settle(self) -> float:
        """Blocks until what was taken is on the device; returns the seconds blocked."""
        return 0.0

    def take(self, keys: Sequence[Key]) -> tuple[tuple[ExpertWeights, ...], float]:
        """Blocks until all keys can be computed with, and pins them; returns them and the seconds blocked.

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
            began = time.perf_counter()
            self._outlook.offer(layer, probabilities)
            worth = self._worth_a_look()
            self.benefit.spent(time.perf_counter() - began)
            if worth:
                self._kick()

    def pays(self, cost_s: float, misses: float) -> bool:
        """Whether the next token is worth predictions of `cost_s` seconds; to be asked once per token.

        Not where there is less to gain than they cost: a token without them is expected to miss `misses` experts, or
        fewer.
        """
        return self.benefit.pays(cost_s) and not (self._copy_s and misses * self._copy_s < cost_s) and misses > 0

    def drop_interrupted(self) -> None:
        """Forgets what a step that was interrupted anywhere has left behind."""
        with self._lock:
            self._drop_interrupted()

    def make_room(self, count: int) -> None:
        """Evicts experts until `count` more would fit; for between tokens, when nothing computes.

        Drops what an interrupted step left pinned, demanded or still to be taken: it would never leave.
        """
        while True:
            with self._lock:
                self._check_usable()
                self._drop_interrupted()
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

    def forget(self, outlook: Outlook) -> None:
        """Begins anew, with no expert on the device and nothing expected but what `outlook` expects."""
        self.make_room(self.store.capacity)
        with self._lock:
            self.store.begin_anew()
            self._outlook, self.benefit = outlook, Benefit()
            self._busy, self._last_request = 1.0, 0.0

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

    def _drop_interrupted(self) -> None:
        """Pins would stay for ever."""
        self.store.unpin_all()

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


def wait_for(uses: Sequence[jax.Array]) -> None:
    """Blocks until computations have ended."""
    for use in uses:
        try:
            use.block_until_ready()
        except Exception:  # one that failed has ended too; whoever reads its result is told
            continue

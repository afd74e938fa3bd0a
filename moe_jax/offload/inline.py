"""Copies issued by the decode thread itself: for accelerators, whose copies run beside compute without a thread."""

from __future__ import annotations

import time
from typing import Any

import jax

from moe_jax.model.experts import ExpertWeights, Key
from moe_jax.offload.decisions import load_error
from moe_jax.offload.loader import Loader, wait_for
from moe_jax.offload.store import is_ready
from moe_jax.trace import Cause, Load


class InlineLoader(Loader):
    """Issues asynchronous copies in `request`, `offer` and `take`: that is, before the computation they hide behind.

    Copies run in the order of issue, so that speculation may queue behind the demands of this layer. `take` hands out
    arrays whose copies are still under way: the device waits for them by itself, and the host dispatches meanwhile what
    is to follow.
    """

    lends = False  # what a layer will demand might have to wait for what is dispatched before

    def __init__(self, *args: Any, quota_bytes: int = 0, **kwargs: Any):
        """`quota_bytes`: speculative bytes in flight at most; one expert is always allowed."""
        super().__init__(*args, **kwargs)
        self._guesses = max(1, quota_bytes // self.store.expert_bytes)
        # Arrays, when they had been issued, and not to be noticed before this time.
        self._flights: dict[Key, tuple[ExpertWeights, float, float]] = {}
        self._handed: dict[Key, ExpertWeights] = {}  # taken while in flight
        self._link_free = 0.0

    def close(self) -> None:
        """Waits for nothing: arrays in flight are dropped."""
        super().close()
        self._flights.clear()
        self._handed.clear()

    def settle(self) -> float:
        """Blocks until what was taken is on the device; returns the seconds blocked."""
        if not self._handed:
            return 0.0
        with self._lock:
            began = time.perf_counter()
            loads = [self._see_arrive(key) for key in list(self._handed)]
            stall = time.perf_counter() - began
            for load in loads:  # what each has cost its layer
                self._noted(load, stall / len(loads))
            self.benefit.stalled(stall)
            return stall

    def _kick(self) -> None:
        self._poll()
        self._starved = False
        while (key := self._next_demand()) is not None:
            self.store.settle()
            if not self.store.has_room(key):
                victim = self._victim_for(key)
                # Never waits here: what cannot be issued now is issued by `take`.
                if victim is None or self.store.draining or not self.store.resident[victim].idle():
                    self._starved = True
                    return
                self._evict(victim)
            self._issue(key, "demand")
        while self._guesses > sum(load.cause == "speculative" for load in self.store.in_flight.values()):
            guess = self._speculation()
            if guess is None:
                return
            self._issue(guess, "speculative")

    def _obtain(self) -> None:
        while True:
            self._poll()
            self._raise_failures()
            if all(key in self.store.resident for key in self._wanted):
                return
            key = self._next_demand()
            if key not in self._wanted:  # all are on their way
                for key in [key for key in self._wanted if key in self._flights]:
                    self._hand_over(key)
                continue
            self.store.settle()
            if self.store.has_room(key):
                self._issue(key, "demand")
            elif self.store.draining:
                wait_for(self.store.draining[0].uses)
            elif (victim := self._victim_for(key)) is not None:
                self._evict(victim)
            else:
                self._land(next(key for key in self._flights if key not in self._wanted))

    def _issue(self, key: Key, cause: Cause) -> None:
        load = self._start(key, cause, self._bank.link_bytes)
        try:
            weights = self._bank.copy(key)
        except Exception as error:
            self._fail(key, error)
            return
        ready, issued = 0.0, time.perf_counter()
        if self._link_s or self._delay:
            ready = max(self._link_free, load.t_issue) + self._link_s + (self._delay(key) if self._delay else 0.0)
            self._link_free = ready
        self._flights[key] = weights, issued, ready

    def _hand_over(self, key: Key) -> None:
        """What computes with an expert on its way waits for it."""
        weights, _, at = self._flights[key]
        if at:  # it only pretends to take so long
            self._land(key)
            return
        del self._flights[key]
        self._handed[key] = weights
        self.store.commit(key, weights)

    def _see_arrive(self, key: Key) -> Load:
        """Waits for an expert that was handed over."""
        weights, load = self._handed.pop(key), self.store.resident[key].load
        try:
            jax.block_until_ready(weights)
        except Exception as error:
            del weights
            self._evict(key)
            raise load_error(key, error) from error
        return load

    def _evict(self, key: Key) -> None:
        self._handed.pop(key, None)
        super()._evict(key)

    def _drop_interrupted(self) -> None:
        super()._drop_interrupted()
        for key in self.store.in_flight.keys() - self._flights.keys():  # Ctrl-C came while it was issued or noticed
            self.store.abort(key)
            self._outlook.hold(key, False)

    def _poll(self) -> None:
        for key in [key for key, weights in self._handed.items() if _all_ready(weights)]:
            self._noted(self._see_arrive(key), 0.0)
        if not self._flights:
            return
        now = time.perf_counter()
        for key in [key for key, (weights, _, at) in self._flights.items() if at <= now and _all_ready(weights)]:
            self._land(key, self._copy_s)

    def _land(self, key: Key, most: float = 0.0) -> None:
        """Waits for a copy in flight, and books its arrival; `most`: it took no longer, it was not noticed at once."""
        weights, issued, at = self._flights[key]
        if (early := at - time.perf_counter()) > 0:
            time.sleep(early)
        try:
            jax.block_until_ready(weights)
        except Exception as error:
            del self._flights[key], weights
            self._fail(key, error)
            return
        took = time.perf_counter() - issued
        self._arrive(key, self._flights.pop(key)[0], min(took, most) if most else took)


def _all_ready(weights: ExpertWeights) -> bool:
    return all(is_ready(array) for array in jax.tree.leaves(weights))

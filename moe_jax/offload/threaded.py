"""Copies issued by one background thread: the only way to overlap on the CPU backend."""

from __future__ import annotations

import atexit
import threading
import time
from typing import Any

import jax

from moe_jax.model.experts import ExpertWeights, Key
from moe_jax.offload.loader import Loader, wait_for
from moe_jax.trace import Load


class ThreadLoader(Loader):
    """One thread copies expert after expert and blocks on each, with the GIL released."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._work = threading.Condition(self._lock)  # for the copy thread
        self._arrived = threading.Condition(self._lock)  # for `take`
        self._stop = threading.Event()  # ends simulated waits at once
        self._crash: BaseException | None = None
        # A daemon, so that a forgotten close() cannot keep the process; atexit, so that it never outlives the backend.
        self._thread = threading.Thread(target=self._run, name="moe_jax-copy", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Joins the thread after the copy in flight."""
        with self._lock:
            self._closed = True
            self._stop.set()
            self._work.notify_all()
            self._arrived.notify_all()
        self._thread.join()
        atexit.unregister(self.close)
        super().close()

    def _check_usable(self) -> None:
        if self._crash is not None:
            raise RuntimeError("the copy thread ended unexpectedly") from self._crash
        super()._check_usable()

    def _kick(self) -> None:
        self._work.notify()

    def _obtain(self) -> None:
        self._work.notify()
        while not all(key in self.store.resident for key in self._wanted):
            self._check_usable()
            self._raise_failures()
            self._arrived.wait()

    # The copy thread.

    def _run(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                if isinstance(job, Load):
                    self._move(job)
                else:
                    wait_for(job)
        except BaseException as error:  # a bug: the decode thread must not wait for ever
            with self._lock:
                self._crash = error
                self._arrived.notify_all()

    def _next_job(self) -> Load | list[jax.Array] | None:
        """Sleeps until there is a copy to make, computations to wait for before one can be made, or the end (None)."""
        with self._lock:
            while not self._closed:
                self._starved = False
                key = self._next_demand()
                if key is None:
                    guess = self._speculation()
                    if guess is not None:
                        return self._start(guess, "speculative")
                else:
                    self.store.settle()
                    if self.store.has_room():
                        return self._start(key, "demand")
                    if self.store.draining:
                        return self.store.draining[0].uses
                    victim = self._victim_for(key)
                    if victim is not None:
                        self._evict(victim)
                        continue
                    self._starved = True
                self._work.wait()
        return None

    def _move(self, load: Load) -> None:
        key = (load.layer, load.expert)
        try:
            weights = self._copy(key, load)
        except Exception as error:
            with self._lock:
                self._fail(key, error)
                self._arrived.notify_all()
            return
        with self._lock:
            self._arrive(key, weights)
            if key in self._wanted:
                self._arrived.notify_all()

    def _copy(self, key: Key, load: Load) -> ExpertWeights:
        weights = jax.block_until_ready(self._bank.copy(key))
        if self._link_s or self._delay:
            rest = load.t_issue + self._link_s - time.perf_counter() + (self._delay(key) if self._delay else 0.0)
            self._stop.wait(max(rest, 0.0))
        return weights

"""Loads moved by background threads: the only way to overlap on the CPU backend, and for reads from a disk on any."""

from __future__ import annotations

import atexit
import threading
import time
from typing import Any

import jax

from moe_jax.model.experts import ExpertWeights, Key
from moe_jax.offload.bank import Transfer
from moe_jax.offload.loader import Loader, wait_for
from moe_jax.trace import Cause, Load


class _Flight:
    """A load under way. Slices are handed out in order; what has moved stays moved while nobody works at it."""

    def __init__(self, key: Key, load: Load, transfer: Transfer):
        self.key, self.load, self.transfer = key, load, transfer
        self.next = self.moving = self.moved = 0  # slices
        self.busy_s = 0.0  # spent on slices, by all threads together
        self.error: Exception | None = None
        self.landing = self.prepared = False

    def has_work(self) -> bool:
        """Whether there is a slice to hand out."""
        return self.next < self.transfer.slices and self.error is None

    def hand_out(self, sharers: int) -> tuple[_Flight, range]:
        """The next slices for a thread to move: its share of what is left."""
        count = -(-(self.transfer.slices - self.next) // sharers)
        self.next += count
        self.moving += count
        return self, range(self.next - count, self.next)


class ThreadLoader(Loader):
    """Threads that move slice after slice and block on each, with the GIL released.

    Demanded experts come first, in the order of demand, each shared by all threads. When nothing of a demanded expert
    is queued or moving, one thread moves one speculative slice at a time. One speculative load is unfinished at most:
    it goes on as long as it is likely enough, waits while demands pass, and is given up for a better one.
    """

    def __init__(self, *args: Any, threads: int = 1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lends = jax.default_backend() == "cpu"  # see `ExpertSource`
        self._work = threading.Condition(self._lock)  # for the threads
        self._arrived = threading.Condition(self._lock)  # for `take`
        self._stop = threading.Event()  # ends simulated waits at once
        self._crash: BaseException | None = None
        self._flights: dict[Key, _Flight] = {}
        self._guess: _Flight | None = None  # the speculative one among them, unless a layer has come to need it
        self._link_free = 0.0
        self._moving = 0  # threads that move slices
        self._moving_since = self._moved_s = 0.0  # the link is busy since then; was busy before that, not reported yet
        # Daemons, so that a forgotten close() cannot keep the process; atexit, so that none outlives the backend.
        self._threads = [
            threading.Thread(target=self._run, name=f"moe_jax-copy-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Joins the threads after the slices that are moving."""
        with self._lock:
            self._closed = True
            self._stop.set()
            self._work.notify_all()
            self._arrived.notify_all()
        for thread in self._threads:
            thread.join()
        atexit.unregister(self.close)
        self._flights.clear()
        self._guess = None
        super().close()

    def _check_usable(self) -> None:
        if self._crash is not None:
            raise RuntimeError("a copy thread ended unexpectedly") from self._crash
        super()._check_usable()

    def _classify(self, key: Key):
        if self._guess is not None and self._guess.key == key:
            self._guess = None  # demanded from now on
            self._work.notify_all()
        return super()._classify(key)

    def _kick(self) -> None:
        # Waking a thread for nothing costs the decode thread its turn: what one finds to do it goes on with by itself.
        if self._demand:
            self._work.notify_all()
        elif not self._moving:  # a thread that moves something looks for more by itself
            self._work.notify()

    def _rouse(self) -> None:
        self._work.notify_all()

    def _worth_a_look(self) -> bool:
        # A thread that moves something looks for more by itself.
        return not self._moving and (self._guess is not None or super()._worth_a_look())

    def _obtain(self) -> None:
        self._work.notify_all()
        while not all(key in self.store.resident for key in self._wanted):
            self._check_usable()
            self._raise_failures()
            if not self._prepare_one():
                self._arrived.wait()

    def _prepare_one(self) -> bool:
        """Something to do for who waits: what an expert that it waits for needs besides its bytes."""
        for key in self._wanted:
            flight = self._flights.get(key)
            if flight is not None and not (flight.prepared or flight.landing):
                flight.prepared = True
                try:
                    self._lock.release()  # inside: Ctrl-C may come right after it
                    flight.transfer.prepare()
                except Exception:  # whoever ends the load tries again, and reports what is wrong
                    pass
                finally:
                    self._lock.acquire()
                return True
        return False

    # The threads.

    def _run(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                if isinstance(job, tuple):
                    self._move(*job)
                else:
                    wait_for(job)
                job = None  # it would keep what it has moved while this thread sleeps
        except BaseException as error:  # a bug: the decode thread must not wait for ever
            with self._lock:
                self._crash = error
                self._arrived.notify_all()

    def _next_job(self) -> tuple[_Flight, range] | list[jax.Array] | None:
        """Sleeps until there is a slice to move, computations to wait for before one can be, or the end (None)."""
        with self._lock:
            while not self._closed:
                self._starved = False
                if (flight := self._urgent()) is not None:
                    self._set_off()
                    return flight.hand_out(len(self._threads))
                key = self._next_demand()
                if key is None:
                    if (flight := self._speculative()) is not None:
                        self._set_off()
                        return flight.hand_out(flight.transfer.slices)
                elif (uses := self._make_way(key)) is not None:
                    if uses:
                        return uses
                    continue
                else:
                    self._starved = True
                self._work.wait()
        return None

    def _set_off(self) -> None:
        """A thread is about to move slices."""
        if not self._moving:
            self._moving_since = time.perf_counter()
        self._moving += 1

    def _busy_s(self, now: float) -> float:
        busy_s, self._moved_s = self._moved_s, 0.0
        if self._moving:
            busy_s += now - self._moving_since
            self._moving_since = now
        return busy_s

    def _make_way(self, key: Key) -> list[jax.Array] | None:
        """One step towards room for a demanded expert, or its start.

        Returns:
          Computations to wait for; empty: the step is done; None: nothing can go before something is released.
        """
        self.store.settle()
        if self.store.has_room(key):
            self._take_off(key, "demand")
            self._work.notify_all()  # to share it
            self._arrived.notify_all()  # to prepare it
            return []
        if self.store.draining and not self.store.layer_full(key[0]):
            return self.store.draining[0].uses
        guess = self._guess
        if guess is not None and not self._outlook.likely(guess.key) and self._give_up():
            return []
        victim = self._victim_for(key)
        if victim is not None:
            self._evict(victim)
            return []
        return [] if self._give_up() else None

    def _urgent(self) -> _Flight | None:
        """A demanded flight with a slice to hand out: what `take` blocks on first, then the oldest."""
        found = None
        for flight in self._flights.values():
            if flight is not self._guess and flight.has_work():
                if flight.key in self._wanted:
                    return flight
                found = found or flight
        return found

    def _speculative(self) -> _Flight | None:
        if any(flight.moving for flight in self._flights.values()):
            return None  # the link is not idle
        guess = self._guess
        if guess is not None and guess.has_work() and self._outlook.likely(guess.key):
            return guess
        key = self._speculation()
        if key is None:
            return None
        self._give_up()
        self._guess = self._take_off(key, "speculative")
        return self._guess

    def _take_off(self, key: Key, cause: Cause) -> _Flight:
        flight = self._flights[key] = _Flight(key, self._start(key, cause, 0), self._bank.start(key))
        return flight

    def _give_up(self) -> bool:
        """Drops the unfinished speculative load, if there is one of which nothing is moving."""
        guess = self._guess
        if guess is None or guess.moving or guess.landing:
            return False
        self._forget(guess)
        self.store.abort(guess.key)
        self._outlook.hold(guess.key, False)
        return True

    def _forget(self, flight: _Flight) -> None:
        del self._flights[flight.key]
        if self._guess is flight:
            self._guess = None

    def _move(self, flight: _Flight, slices: range) -> None:
        """Moves slices; the thread that ends the last one lands the flight."""
        began, moved, error = time.perf_counter(), 0, None
        try:
            for index in slices:
                started = time.perf_counter()
                flight.transfer.move(index)
                self._throttle(started, flight.transfer.slices)
                moved += 1
        except Exception as failure:
            error = failure
        with self._lock:
            now = time.perf_counter()
            flight.busy_s += now - began
            self._moving -= 1
            if not self._moving:
                self._moved_s += now - self._moving_since
            flight.moving -= len(slices)
            flight.moved += moved
            flight.load.bytes += sum(map(flight.transfer.size, slices[:moved]))
            flight.error = flight.error or error
            if flight.moving or (flight.moved < flight.transfer.slices and flight.error is None):
                return
            flight.landing = True
            self._work.notify()  # another thread has the link meanwhile
        self._land(flight)

    def _land(self, flight: _Flight) -> None:
        weights: ExpertWeights | None = None
        error, flight.error = flight.error, None
        if error is None:
            try:
                weights = flight.transfer.finish()
                if self._delay:
                    self._stop.wait(self._delay(flight.key))
            except Exception as failure:
                error = failure
        with self._lock:
            self._forget(flight)
            if error is not None:
                self._fail(flight.key, error)
            else:
                assert weights is not None
                self._arrive(flight.key, weights, flight.busy_s / self._sharers(flight))
            self._arrived.notify_all()

    def _sharers(self, flight: _Flight) -> int:
        """Threads that shared a load: all of them, where it was demanded and has slices enough."""
        return min(len(self._threads), flight.transfer.slices) if flight.load.cause == "demand" else 1

    def _throttle(self, began: float, slices: int) -> None:
        """A simulated link takes one slice after another, whoever moves them; the real move is part of its time."""
        if self._link_s:
            with self._lock:
                self._link_free = max(self._link_free, began) + self._link_s / slices
                rest = self._link_free - time.perf_counter()
            self._stop.wait(max(rest, 0.0))

"""Measurements of the machine that settings are chosen by: link, overlap, disk, memory. No model is needed."""

from __future__ import annotations

import errno
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_jax.memory import pages
from moe_jax.model.primitives import linear
from moe_jax.offload.copies import to_device
from moe_jax.offload.settings import BLOCK, Mode, Settings

KIB, MIB = 2**10, 2**20
PUT_SIZES = tuple(64 * KIB * 4**i for i in range(6))  # 64 KiB to 64 MiB
PUT_LIST = 8  # arrays of one call
SLICES = (256 * KIB, MIB, 4 * MIB, 8 * MIB)
THREADS = (1, 2, 4)
ARENA_BYTES = 32 * MIB  # that each thread reads into, in turn: as long as a run's, and like it on huge pages
ROUNDS = 3
NEAR = 0.9  # what gives this share of the best bandwidth is as good as the best
CLEARLY = 0.1  # hidden share by which another way must be better than the backend's default


class Put(NamedTuple):
    """Copies from pinned_host to the device: one array a call, or a list of arrays a call."""

    nbytes: int  # of the call
    arrays: int
    seconds: float  # of the call, until all has arrived

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.seconds


class Overlap(NamedTuple):
    """Copy and compute of about the same length, together.

    Attributes:
      compute: "memory" streams weights, as decoding does; "cache" works on little data.
      how: "before" and "after": the thread that dispatches the compute issues the copy before or after it; "thread": a
        thread of its own issues it and waits.
      hidden: (Tc + Tt - both) / min(Tc, Tt): 1 is perfect overlap, 0 none, below 0 they disturb each other.
    """

    compute: str
    how: str
    copy_s: float
    compute_s: float
    both_s: float

    @property
    def hidden(self) -> float:
        return (self.copy_s + self.compute_s - self.both_s) / min(self.copy_s, self.compute_s)


class Read(NamedTuple):
    """Random reads of one size from disk, past the page cache; the best of some rounds."""

    slice_bytes: int
    threads: int
    bytes_per_s: float


def puts(seconds: float) -> list[Put]:
    """Median call by size, single and in lists (of the same bytes an array, up to the largest size in all)."""
    device, host = _memories()
    found = []
    for count in (1, PUT_LIST):
        for size in (s for s in PUT_SIZES if s * count <= PUT_SIZES[-1]):
            arrays = [jax.device_put(_numbers(size), host) for _ in range(count)]
            put = lambda arrays=arrays: jax.block_until_ready(to_device(arrays, device))
            found.append(Put(size * count, count, _median(put, seconds)))
    return found


def overlaps(seconds: float, total: int = 32 * MIB) -> list[Overlap]:
    """Every way to issue a copy of `total` bytes, an expert's two matrices, beside each kind of compute; medians."""
    device, host = _memories()
    arrays = [jax.device_put(_numbers(total // 2), host) for _ in range(2)]
    put = lambda: to_device(arrays, device)
    wait = jax.block_until_ready
    copy_s = _median(lambda: wait(put()), seconds / 5)
    found = []
    with ThreadPoolExecutor(1) as pool:
        for name, width in (("memory", 4096), ("cache", 256)):
            weight, x = jax.device_put(_numbers(4 * width * width).reshape(width, width), device), jnp.ones((1, width))
            steps = 4
            for _ in range(3):  # few steps are mostly the dispatch
                taken = _median(lambda w=weight, x=x, n=steps: wait(_chain(w, x, n)), seconds / 10)
                steps = max(1, round(steps * copy_s / taken))
            compute = lambda w=weight, x=x, steps=steps: _chain(w, x, steps)

            def beside_thread(compute=compute) -> None:
                copying = pool.submit(lambda: wait(put()))
                wait(compute())
                copying.result()

            ways: dict[str, Callable[[], Any]] = {
                "copy": lambda: wait(put()),
                "compute": lambda compute=compute: wait(compute()),
                "before": lambda compute=compute: wait((put(), compute())),
                "after": lambda compute=compute: wait((compute(), put())),
                "thread": beside_thread,
            }
            s = _in_turn(ways, seconds)
            found += [Overlap(name, how, s["copy"], s["compute"], s[how]) for how in ("before", "after", "thread")]
    return found


def matvecs(seconds: float, width: int = 4096) -> dict[str, float]:
    """Bytes of weights per second of a matrix-vector product, by dtype, for 256 MiB of float32 in all."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        weights = [jnp.asarray(_numbers(4 * width * width).reshape(width, width), dtype) for _ in range(4)]
        x = jnp.ones((1, width), dtype)
        run = lambda weights=weights, x=x: jax.block_until_ready(_products(weights, x))
        found[dtype] = sum(w.nbytes for w in weights) / _median(run, seconds)
    return found


def reads(file: Path, seconds: float) -> list[Read]:
    """Random aligned reads by size and number of threads.

    Raises:
      OSError: the file cannot be read.
    """
    flags, direct = os.O_RDONLY | getattr(os, "O_DIRECT", 0), hasattr(os, "O_DIRECT")
    try:
        handle = os.open(file, flags)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        handle, direct = os.open(file, os.O_RDONLY), False  # this file system has no O_DIRECT
    memory = pages(max(THREADS) * ARENA_BYTES)
    np.frombuffer(memory, np.uint8)[::BLOCK] = 1  # no read should wait for pages that are new
    arenas = [memoryview(memory)[i * ARENA_BYTES : (i + 1) * ARENA_BYTES] for i in range(max(THREADS))]
    try:
        size = os.fstat(handle).st_size // BLOCK * BLOCK
        ways = [(nbytes, arenas[:threads]) for threads in THREADS for nbytes in SLICES]
        rounds = [
            [_read_randomly(handle, size, *way, seconds / ROUNDS, direct, seed) for way in ways]
            for seed in range(ROUNDS)
        ]
        # Whatever else reads meanwhile only slows a round down.
        best = map(max, zip(*rounds, strict=True))
        return [Read(nbytes, len(own), rate) for (nbytes, own), rate in zip(ways, best, strict=True)]
    finally:
        os.close(handle)


def choose(platform: str, put: Sequence[Put], overlap: Sequence[Overlap], read: Sequence[Read]) -> Settings:
    """The settings that the measurements speak for; near the default nothing changes.

    issue_mode: the default of the platform, unless the other way hides clearly more, both computes taken together.
    inline_quota_bytes: what the link moves at its best in the time that the smallest copy takes: with so much in flight
      it does not wait for the next call. A demand waits for all of it.
    read_threads, then slice_bytes: the default if it is near the best, otherwise the least that is: a demand waits for
      one slice. Beside compute a second thread is worth more than it shows here (see `Settings`).
    """
    hidden = {how: statistics.mean(o.hidden for o in overlap if o.how == how) for how in ("before", "thread")}
    ways: dict[Mode, float] = {"inline": hidden["before"], "thread": hidden["thread"]}
    usual = Settings.default(platform)
    best = max(ways, key=lambda mode: ways[mode])
    mode = best if ways[best] > ways[usual.issue_mode] + CLEARLY else usual.issue_mode
    latency, rate = min(p.seconds for p in put), max(p.bytes_per_s for p in put)
    quota = round(latency * rate) if mode == "inline" else 0
    good = _near(read, lambda r: r.bytes_per_s)
    threads = _usual_or_least(usual.read_threads, [r.threads for r in good])
    slice_bytes = _usual_or_least(usual.slice_bytes, [r.slice_bytes for r in good if r.threads == threads])
    return Settings(mode, threads, slice_bytes, quota)


def _near(found: Sequence[Any], rate: Callable[[Any], float]) -> list[Any]:
    best = max(map(rate, found))
    return [x for x in found if rate(x) >= NEAR * best]


def _usual_or_least(usual: int, good: Sequence[int]) -> int:
    return usual if usual in good else min(good)


def _memories() -> tuple[SingleDeviceSharding, SingleDeviceSharding]:
    device = jax.devices()[0]
    return (
        SingleDeviceSharding(device, memory_kind="device"),
        SingleDeviceSharding(device, memory_kind="pinned_host"),
    )


def _numbers(nbytes: int) -> np.ndarray:
    """Not zeros, whose pages need not exist."""
    return np.random.default_rng(0).random(nbytes // 4, np.float32)


@jax.jit
def _chain(weight: jax.Array, x: jax.Array, steps: int) -> jax.Array:
    return jax.lax.fori_loop(0, steps, lambda _, x: jnp.tanh(linear(x, weight)), x)


@jax.jit
def _products(weights: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    return [linear(x, weight) for weight in weights]


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _median(call: Callable[[], Any], seconds: float) -> float:
    return _in_turn({"": call}, seconds)[""]


def _in_turn(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Medians of each, one after another again and again, so that what else the machine does hits all alike."""
    for call in calls.values():
        call()  # compiles, and touches what is touched for the first time
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 3:
        for name, call in calls.items():
            taken[name].append(_seconds(call))
    return {name: statistics.median(times) for name, times in taken.items()}


def _read_randomly(
    handle: int, size: int, nbytes: int, arenas: list[memoryview], seconds: float, direct: bool, seed: int
) -> float:
    """Bytes per second of one thread for each arena."""
    end = time.perf_counter() + seconds

    def reader(thread: int) -> int:
        rng, done, at = np.random.default_rng((seed, thread)), 0, 0
        while not done or time.perf_counter() < end:
            offset = int(rng.integers((size - nbytes) // BLOCK + 1)) * BLOCK
            if not direct:
                os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)
            done += os.preadv(handle, [arenas[thread][at : at + nbytes]], offset)
            at = (at + nbytes) % ARENA_BYTES
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(len(arenas)) as pool:
        total = sum(pool.map(reader, range(len(arenas))))
    return total / (time.perf_counter() - began)

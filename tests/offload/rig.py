"""A bank of tiny experts that counts, independently of the store's books, what is alive on the device."""

import threading
import time
import weakref
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint.families import mixtral
from moe_jax.model.experts import ExpertWeights
from moe_jax.offload.bank import HostBank, WholeCopy
from moe_jax.offload.source import OffloadedExperts

L, E, K, D, F = 3, 6, 2, 4, 3
ARCHITECTURE = mixtral.architecture(
    vocab_size=8, d_model=D, num_layers=L, num_heads=1, num_kv_heads=1, head_dim=4, num_experts=E, top_k=K,
    expert_ff=F, max_seq_len=8,
)  # fmt: skip


class FakeCheckpoint:
    """Every expert's numbers tell which expert it is."""

    architecture = ARCHITECTURE

    def expert(self, layer, expert) -> Any:
        base = 1000 * layer + 100 * expert
        return base + np.arange(2 * F * D, dtype=np.float32).reshape(2 * F, D), -base * np.ones((D, F), np.float32)


BANK = HostBank(FakeCheckpoint())


class _Computation:
    """Stands for the `after` array of a computation that ends `seconds` from now, or when `end` is called."""

    def __init__(self, seconds=None):
        self._ends = np.inf if seconds is None else time.perf_counter() + seconds

    def is_ready(self):
        return time.perf_counter() >= self._ends

    def end(self):
        self._ends = 0.0

    def block_until_ready(self):
        while not self.is_ready():
            time.sleep(2e-4)


Computation: Any = _Computation  # a duck: type checkers would ask for a jax.Array


class WatchedBank:
    """Copies from `BANK`; counts by finalizers on the arrays it gave out and by computations that still run.

    A gate holds copies up until `let(n)`; `fail` names keys whose copy raises.
    """

    expert_bytes = link_bytes = BANK.expert_bytes

    def __init__(self, capacity=L * E, gated=False):
        self.capacity = capacity
        self.copied = []  # keys, in order of issue
        self.excess = []  # copies issued beyond the capacity
        self.fail = set()
        self.started = threading.Semaphore(0)
        self._gated, self._gate = gated, threading.Semaphore(0)
        self._alive = {}  # number of the copy -> how many of its arrays exist
        self._latest = {}  # key -> number of its latest copy
        self.taken = set()  # numbers of the copies that were ever taken
        self._uses = []  # (computation, numbers of the copies it uses)

    def let(self, count=1):
        self._gate.release(count)

    def wait_started(self, timeout=5.0):
        assert self.started.acquire(timeout=timeout), "no copy was issued"

    def count(self):
        """Experts that take device memory now."""
        numbers = {number for number, arrays in list(self._alive.items()) if arrays}
        for computation, used in self._uses:
            if not computation.is_ready():
                numbers |= used
        return len(numbers)

    def uses(self, computation, keys):
        self._uses = [use for use in self._uses if not use[0].is_ready()]
        self._uses.append((computation, {self._latest[key] for key in keys}))

    def take_note(self, keys):
        self.taken |= {self._latest[key] for key in keys}

    def copy(self, key):
        number = len(self.copied)
        self.copied.append(key)
        self.started.release()
        if self.count() + 1 > self.capacity:
            self.excess.append(key)
        if self._gated:
            assert self._gate.acquire(timeout=5), "the test never let this copy go"
        if key in self.fail:
            raise OSError("the bank is on fire")
        weights = BANK.copy(key)
        self._latest[key] = number
        arrays = jax.tree.leaves(weights)
        self._alive[number] = len(arrays)
        for array in arrays:
            weakref.finalize(array, self._died, number)
        return weights

    def start(self, key):
        return WholeCopy(self.copy, key, self.link_bytes)

    def close(self):
        pass

    def _died(self, number):
        self._alive[number] -= 1


def check_contents(key, weights: ExpertWeights):
    gate_up, down = FakeCheckpoint().expert(*key)
    np.testing.assert_array_equal(weights.gate_up, gate_up)
    np.testing.assert_array_equal(weights.down, down)


def source(bank, experts, mode, **options):
    """An expert source whose budget holds `experts` experts."""
    return OffloadedExperts(bank, ARCHITECTURE, experts * BANK.expert_bytes, mode=mode, **options)


def within(seconds, function, *args):
    """Runs `function` in a thread and fails when it hangs; returns or raises what it does."""
    result = []

    def run():
        try:
            result.append((True, function(*args)))
        except BaseException as error:
            result.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"{function.__name__} hangs"
    good, value = result.pop()
    if not good:
        raise value
    return value


def eventually(condition, seconds=5.0):
    """Waits until `condition()` holds."""
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "never happened"
        time.sleep(5e-4)


def predictions(*layers):
    """Probabilities [H, E] from one dict {expert: probability} for each layer ahead; the rest are 0."""
    table = np.zeros((len(layers), E), np.float32)
    for row, experts in zip(table, layers, strict=True):
        for expert, probability in experts.items():
            row[expert] = probability
    return table


def ready():
    """An `after` that is ready."""
    return jax.block_until_ready(jax.numpy.zeros(()))

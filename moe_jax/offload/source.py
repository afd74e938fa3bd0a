"""`OffloadedExperts`: the expert source whose experts live off the device."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import ExpertWeights, Key, Lent
from moe_jax.offload.history import Expect
from moe_jax.offload.inline import InlineLoader
from moe_jax.offload.loader import Loader
from moe_jax.offload.outlook import Outlook
from moe_jax.offload.policies import LRU, Eviction
from moe_jax.offload.settings import Mode, Settings
from moe_jax.offload.store import ArrayStore
from moe_jax.offload.threaded import ThreadLoader
from moe_jax.trace import Trace

BUDGET_FLAG = "--config.offload.device_budget"
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_budget(text: str, total_bytes: int, auto_bytes: int | None = None, flag: str = BUDGET_FLAG) -> int:
    """Bytes meant by `"25%"` (of `total_bytes`), `"512MiB"`, `"6GiB"`, or `"auto"` (`auto_bytes`, at most the total).

    Raises:
      UserError: it is none of these, or nothing is known for "auto".
    """
    text = str(text).strip()
    if text == "auto":
        if auto_bytes is None:
            raise UserError(f'{flag}=auto: this device does not tell its free memory; give bytes ("6GiB") or "25%"')
        return max(0, min(auto_bytes, total_bytes))
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[A-Za-z]+)", text)
    if match and match[2] == "%":
        return int(float(match[1]) * total_bytes / 100)
    if match and match[2] in _UNITS:
        return int(float(match[1]) * _UNITS[match[2]])
    raise UserError(f'{flag}={text!r} is no budget; give bytes ("512MiB", "6GiB"), a share ("25%") or "auto"')


def check_budget(budget_bytes: int, a: Architecture, expert_bytes: int, per_layer: bool = False) -> None:
    """Raises UserError naming the smallest legal budget if this one is below it.

    That is K experts of one layer; where every layer has a share of its own (`per_layer`), K of every layer.
    """
    experts = a.top_k * (a.num_moe_layers if per_layer else 1)
    if budget_bytes < experts * expert_bytes:
        share = 100 * experts / (a.num_moe_layers * a.num_experts)
        raise UserError(
            f"a device budget of {budget_bytes} bytes is too small: the smallest is {experts} experts,"
            f" {BUDGET_FLAG}={experts * expert_bytes}B ({share:.3g}% of all)"
        )


class OffloadedExperts:
    """An `ExpertSource` over a bank, a store under a byte budget and a loader. For one decode thread.

    Attributes:
      bank: where the experts are.
      trace: what happened; replace it to start a new record (between tokens).
    """

    def __init__(
        self,
        bank: Any,
        architecture: Architecture,
        budget_bytes: int,
        *,
        policy: Eviction | None = None,
        mode: Mode | None = None,
        link_gbps: float = 0.0,
        trace: Trace | None = None,
        delay: Callable[[Key], float] | None = None,
        per_layer: bool = False,
        threads: int = 1,
        quota_bytes: int = 0,
        expect: Expect | None = None,
    ):
        """
        Args:
          bank: where the experts are, a `Bank`, for mode "inline" an `AsyncBank`.
          budget_bytes: on the device at most: resident, in flight, and evicted but still computed with.
          policy: of eviction; default LRU.
          mode: who issues copies; default by the backend, see `Settings`.
          link_gbps: simulated link, 10^9 bytes per second; 0: none.
          delay: seconds that the arrival of an expert is held up, for tests.
          per_layer: every layer gets an equal share of the budget; otherwise they compete for all of it.
          threads: that move experts, in mode "thread".
          quota_bytes: speculative bytes in flight at most, in mode "inline"; one expert is always allowed.
          expect: how often experts will be used, given how often they were; see `History`.

        Raises:
          UserError: the budget is too small.
        """
        a = architecture
        check_budget(budget_bytes, a, bank.expert_bytes, per_layer)
        self.bank = bank
        self._uses = a.num_moe_layers * a.top_k  # of experts, by one token
        self._keys = [(layer, expert) for layer in range(a.num_moe_layers) for expert in range(a.num_experts)]
        share = budget_bytes // bank.expert_bytes // a.num_moe_layers if per_layer else 0
        store = ArrayStore(budget_bytes, bank.expert_bytes, policy or LRU(), (a.num_moe_layers, a.num_experts), share)
        self._new_outlook = lambda: Outlook(a.num_moe_layers, a.num_experts, a.top_k, expect)
        outlook = self._new_outlook()
        options = {"link_gbps": link_gbps, "delay": delay}
        self._loader: Loader = (
            ThreadLoader(bank, store, outlook, threads=threads, **options)
            if (mode or Settings.default(jax.default_backend()).issue_mode) == "thread"
            else InlineLoader(bank, store, outlook, quota_bytes=quota_bytes, **options)
        )
        self.trace = trace or Trace()

    @property
    def trace(self) -> Trace:
        """What happened since it was set."""
        return self._loader.trace

    @trace.setter
    def trace(self, trace: Trace) -> None:
        trace.peak_bytes = max(trace.peak_bytes, self._loader.store.used_bytes)
        self._loader.trace = trace

    @property
    def store(self) -> ArrayStore:
        """The books of the device store, to read."""
        return self._loader.store

    def begin_token(self, token: int) -> None:
        """A decode step, or the prefill (token -1), starts. What an interrupted step left behind is dropped."""
        self._loader.drop_interrupted()
        if token < 0:
            self._loader.benefit.prompt()
        self._loader.trace.begin_token(token)

    def request(self, layer: int, experts: Sequence[int], by_token: np.ndarray | None = None) -> list[int]:
        """States every expert that `layer` needs now, in router order; misses are demanded at once.

        What an earlier request demanded and has not issued is dropped. Returns the experts in the order in which they
        are best run: resident ones, then by expected arrival.

        `by_token`: of a prompt, the experts that each of its tokens uses, bool [T, E].
        """
        experts = list(dict.fromkeys(experts))
        outcomes = self._loader.request(layer, [(layer, expert) for expert in experts], by_token)
        self._loader.trace.step(layer, experts, outcomes)
        if "missed" not in outcomes and "late" not in outcomes:
            return experts
        rank = {"cached": 0, "prefetched": 0, "late": 1, "missed": 2}
        return [expert for _, expert in sorted(zip(outcomes, experts, strict=True), key=lambda pair: rank[pair[0]])]

    def ready(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether `take` would not have to wait for these experts now."""
        return all((layer, int(expert)) in self.store.resident for expert in experts)

    @property
    def lends(self) -> bool:
        """Whether `borrow` ever gives anything."""
        return self._loader.lends

    def borrow(self, layer: int, experts: Sequence[int] | None = None) -> Lent | None:
        """Those of these experts that there are, before `layer` states what it needs; they stay until `give_back`.

        `experts`: None: all of the layer. Returns None if there are none.
        """
        return self._loader.borrow(layer, experts)

    def give_back(self, layer: int, needed: Sequence[int], after: jax.Array) -> None:
        """Ends what `borrow` began, once `layer` has requested what it needs; `after` as for `release`.

        `needed`: those of the experts lent that are; they count as taken and released.
        """
        self._loader.give_back(layer, [(layer, expert) for expert in needed], after)

    def take(self, layer: int, experts: Sequence[int]) -> tuple[ExpertWeights, ...]:
        """Blocks until these experts can be computed with, and pins them; what was evicted meanwhile is loaded again.

        The arrays must not be used for a computation dispatched after `release`: they may be deleted then.

        Raises:
          LoadError: a copy failed; the text names the expert.
          RuntimeError: more experts than the budget holds beside those not released yet, or the source is closed.
        """
        weights, stall = self._loader.take([(layer, int(expert)) for expert in experts])
        if stall:
            self._loader.trace.stall(stall)
        return weights

    def settle(self) -> None:
        """Blocks until what was taken is on the device, before the host waits for what is computed with it.

        Raises:
          LoadError: a copy failed; the text names the expert.
        """
        if stall := self._loader.settle():
            self._loader.trace.stall(stall)

    def release(self, layer: int, experts: Sequence[int], after: jax.Array) -> None:
        """Unpins them; `after` (never donated) is ready once the last computation that uses them has completed."""
        self._loader.release([(layer, int(expert)) for expert in experts], after)

    def offer(self, layer: int, probabilities: np.ndarray) -> None:
        """Predicted P(needed), float32 [horizon, E], for layers `layer + 1, ...`, wrapping into the next token.

        Layer -1: made from the token alone, before layer 0 has run.
        """
        if layer >= 0:  # a trace keeps what was predicted after a step; before layer 0 there is none
            self._loader.trace.predict(probabilities)
        self._loader.offer(layer, probabilities)

    def resident(self) -> list[ExpertWeights]:
        """The experts on the device. Speculation stops until the next prediction, so that they stay."""
        self._loader.make_room(0)
        return [entry.weights for entry in self.store.resident.values()]

    def forget(self) -> None:
        """Drops every expert, and what is remembered of earlier texts: what comes next starts as from a new source."""
        self._loader.forget(self._new_outlook())

    def wants_prediction(self, cost_s: float) -> bool:
        """Whether predictions of `cost_s` seconds per token are likely to gain more than that; once per token."""
        absent = 1 - len(self.store.resident) / len(self._keys)
        # If a token used all experts alike: those that are absent are the less used ones.
        return self._loader.pays(cost_s, absent * self._uses)

    def link_bytes_per_s(self, experts: int = 8) -> float:
        """What the link alone gives to a plain reader of the same experts: the best of 1, 2 and 4 threads.

        Experts leave the store to make room for these loads, so that the budget holds; they are dropped afterwards.

        Args:
          experts: loaded by each number of threads, at least twice as many as there are threads; at random.
        """
        rates, rng = [], np.random.default_rng(0)
        for depth in (1, 2, 4):
            if depth > self.store.capacity:
                break
            count = max(experts, 2 * depth)
            room = min(count, self.store.capacity)
            self._loader.make_room(room)
            turns = [self._keys[i] for i in rng.integers(0, len(self._keys), count)]
            # Kept, as a run keeps them: what is read over what was read just before is faster than a run's can be.
            kept: deque[ExpertWeights] = deque(maxlen=room - depth)
            with ThreadPoolExecutor(depth) as pool:
                began = time.perf_counter()
                for _ in pool.map(lambda key, kept=kept: kept.append(self._load(key)), turns):
                    pass
                rates.append(len(turns) * self.bank.link_bytes / (time.perf_counter() - began))
        return max(rates)

    def _load(self, key: Key) -> ExpertWeights:
        transfer = self.bank.start(key)
        for index in range(transfer.slices):
            transfer.move(index)
        return transfer.finish()

    def close(self) -> None:
        """Stops background work, drops the experts and closes the bank. May be called again."""
        self._loader.close()
        self.bank.close()

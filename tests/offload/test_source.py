"""The whole offload room under random use: right contents, budget kept, no deadlock, honest trace."""

import random
from collections import OrderedDict

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_jax.errors import UserError
from moe_jax.offload.policies import Predicted
from moe_jax.offload.source import parse_budget
from moe_jax.trace import Trace
from tests.offload.rig import (
    BANK,
    Computation,
    E,
    K,
    L,
    WatchedBank,
    check_contents,
    eventually,
    ready,
    source,
    within,
)

EXPERTS = st.lists(st.integers(0, E - 1), min_size=1, max_size=E, unique=True)


class SourceMachine(RuleBasedStateMachine):
    """A decode thread that does anything it may, in both modes, at every budget, with random delays and failures."""

    @initialize(
        mode=st.sampled_from(["thread", "inline"]),
        capacity=st.integers(K, L * E),
        longest=st.sampled_from([0.0, 0.002]),
        seed=st.integers(0, 99),
    )
    def open(self, mode, capacity, longest, seed):
        self.random = random.Random(seed)
        self.bank = WatchedBank(capacity)
        delay = (lambda key: self.random.random() * longest) if longest else None
        self.source = source(self.bank, capacity, mode, delay=delay)
        self.mode, self.longest = mode, longest
        self.layer, self.left, self.taken = 0, [], {}

    @rule(token=st.integers(-1, 3))
    @precondition(lambda self: not self.taken)
    def begin_token(self, token):
        self.source.begin_token(token)

    @rule(layer=st.integers(0, L - 1), experts=EXPERTS)
    @precondition(lambda self: not self.taken)
    def request(self, layer, experts):
        order = self.source.request(layer, experts)
        step = self.source.trace.steps()[-1]
        assert sorted(order) == sorted(experts) and step.needed == tuple(experts)
        outcome = dict(zip(experts, step.outcomes, strict=True))
        ranks = [{"late": 1, "missed": 2}.get(outcome[expert], 0) for expert in order]
        assert ranks == sorted(ranks)
        loaded = {(load.layer, load.expert) for load in self.source.trace.loads}
        for expert in experts:  # what is neither on the device nor coming has to have been missed
            assert outcome[expert] == "missed" or (layer, expert) in loaded
        self.layer, self.left = layer, order

    @rule(data=st.data(), size=st.integers(1, K), advised=st.booleans())
    @precondition(lambda self: self.left and not self.taken)
    def take(self, data, size, advised):
        drawn = data.draw(st.permutations(range(E)))  # of all: what is drawn may not depend on timing
        group = (self.left if advised else [expert for expert in drawn if expert in self.left])[:size]
        self.left = [expert for expert in self.left if expert not in group]
        self.taken = dict(zip(group, within(5, self.source.take, self.layer, group), strict=True))
        self.bank.take_note([(self.layer, expert) for expert in group])

    @rule(factor=st.sampled_from([0.0, 0.0, 1.0]))
    @precondition(lambda self: self.taken)
    def release(self, factor):
        for expert, weights in self.taken.items():
            check_contents((self.layer, expert), weights)
        del weights
        experts, self.taken = list(self.taken), {}
        computation = Computation(self.random.random() * 0.003 * factor)
        self.bank.uses(computation, [(self.layer, expert) for expert in experts])
        self.source.release(self.layer, experts, computation)

    @rule(horizon=st.integers(1, 2 * L), seed=st.integers(0, 99), sharp=st.booleans())
    def offer(self, horizon, seed, sharp):
        table = np.random.default_rng(seed).random((horizon, E), np.float32)
        self.source.offer(self.layer, np.round(table) if sharp else table)

    @rule(key=st.tuples(st.integers(0, L - 1), st.integers(0, E - 1)))
    def break_one_speculation(self, key):
        # Only while nothing is demanded, so that no take is meant to fail.
        if not self.left and not self.taken:
            self.bank.fail = {key}
            self.source.offer(self.layer, np.full((L, E), 0.9, np.float32))
            self.bank.fail = set()

    @invariant()
    def budget_is_kept(self):
        if hasattr(self, "bank"):
            assert not self.bank.excess
            assert self.bank.count() <= self.bank.capacity
            for expert, weights in self.taken.items():
                check_contents((self.layer, expert), weights)

    def teardown(self):
        if not hasattr(self, "source"):
            return
        if self.taken:
            self.release(0.0)
        within(5, self.source.settle)  # what is handed out on its way has arrived too
        within(5, self.source.close)
        trace, store = self.source.trace, self.source.store
        done = [load for load in trace.loads if load.t_done is not None]
        assert [(load.layer, load.expert) for load in trace.loads] == self.bank.copied
        assert sum(load.used for load in done) == len(self.bank.taken)
        assert trace.peak_bytes == store.peak_bytes <= store.budget_bytes
        eventually(lambda: self.bank.count() == 0)


TestSource = SourceMachine.TestCase
TestSource.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("mode", ["thread", "inline"])
@settings(max_examples=10, deadline=None)
@given(
    capacity=st.integers(K, L * E),
    steps=st.lists(st.lists(st.integers(0, E - 1), min_size=K, max_size=K, unique=True), min_size=L, max_size=30),
)
def test_without_predictions_it_is_plain_lru(mode, capacity, steps):
    """Outcomes and loads of decoding equal those of a textbook LRU cache: they do not depend on timing."""
    bank, cache, loads = WatchedBank(capacity), OrderedDict(), []
    s = source(bank, capacity, mode)
    for index, experts in enumerate(steps):
        keys = [(index % L, expert) for expert in experts]
        expected = tuple("cached" if key in cache else "missed" for key in keys)
        # The needed ones are all recent before anything is evicted.
        for key in keys:
            if key in cache:
                cache.move_to_end(key)
        for key in keys:
            if key not in cache:
                loads.append(key)
                if len(cache) == capacity:
                    cache.popitem(last=False)
            cache[key] = True
            cache.move_to_end(key)
        s.request(index % L, experts)
        assert s.trace.steps()[-1].outcomes == expected
        weights = within(5, s.take, index % L, experts)
        for key, one in zip(keys, weights, strict=True):
            check_contents(key, one)
        del weights, one
        s.release(index % L, experts, ready())
    assert bank.copied == loads and not bank.excess
    s.close()


@pytest.mark.parametrize("mode", ["thread", "inline"])
def test_real_computations_with_real_arrays(mode):
    """Jitted computations that still run when their experts are released give the right numbers at the least budget."""
    run = jax.jit(lambda weights, x: jax.lax.fori_loop(0, 200, lambda i, y: y + weights[0].gate_up[0, 0] * x, x))
    s = source(WatchedBank(K), K, mode)
    x, results = jax.numpy.ones((64, 64)), []
    for index in range(40):
        layer, expert = index % L, index % E
        s.begin_token(index)
        order = s.request(layer, [expert, (expert + 1) % E])
        weights = within(5, s.take, layer, [expert, (expert + 1) % E])
        result = run(weights, x)
        del weights
        s.release(layer, order, result)
        s.offer(layer, np.random.default_rng(index).random((L, E), np.float32))
        results.append((1000 * layer + 100 * expert, result))
    for base, result in results:
        np.testing.assert_array_equal(result, np.full((64, 64), 1 + 200.0 * base, np.float32))
    s.close()


def test_the_smallest_legal_budget_is_named():
    with pytest.raises(UserError, match=rf"--config.offload.device_budget={K * BANK.expert_bytes}B") as error:
        source(WatchedBank(), K - 1, "thread")
    assert "\n" not in str(error.value)
    advised = str(error.value).split("device_budget=")[1].split()[0]
    assert parse_budget(advised, 10**9) == K * BANK.expert_bytes
    source(WatchedBank(), K, "thread").close()


def test_a_new_trace_starts_from_what_is_held():
    s = source(WatchedBank(), 4, "inline")
    s.request(0, [0, 1])
    s.take(0, [0, 1])
    s.trace = Trace()
    assert s.trace.peak_bytes == 2 * BANK.expert_bytes and not s.trace.loads
    s.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25%", 250), ("100%", 1000), ("12.5 %", 125), ("512MiB", 2**29), ("6GiB", 6 * 2**30), ("1.5GiB", 3 * 2**29),
        ("7B", 7), ("2KB", 2000), ("auto", 600), (" 25% ", 250),
    ],
)  # fmt: skip
def test_budgets(text, expected):
    assert parse_budget(text, 1000, auto_bytes=600) == expected


@pytest.mark.parametrize("text", ["", "25", "abc", "-3%", "6 gib", "6GiBs", "%", "1e3MiB", "auto"])
def test_no_budgets(text):
    with pytest.raises(UserError, match="device_budget") as error:
        parse_budget(text, 1000)
    assert "\n" not in str(error.value)


def test_auto_takes_no_more_than_all_experts():
    assert parse_budget("auto", 1000, auto_bytes=5000) == 1000
    assert parse_budget("auto", 1000, auto_bytes=-5) == 0


@pytest.mark.parametrize("mode", ["thread", "inline"])
def test_what_only_the_start_of_a_prompt_used_goes_first(mode):
    s = source(WatchedBank(3), 3, mode, policy=Predicted())
    used = np.zeros((30, E), bool)
    used[:15, 2] = used[15:, 0] = True
    s.begin_token(-1)
    for layer, experts, by_token in ((0, [0, 2], used), (1, [1, 3], used)):
        for expert in s.request(layer, experts, by_token):
            s.take(layer, [expert])
            s.release(layer, [expert], ready())
    assert set(s.store.resident) == {(0, 0), (1, 1), (1, 3)}
    s.close()


@pytest.mark.parametrize("absent, cost, pays", [(3, 0.9, True), (3, 1.1, False), (0, 0.0, False)])
def test_where_nearly_all_experts_are_there_nothing_is_predicted(absent, cost, pays):
    """A copy takes a second, and a token uses a third of all experts: of three absent ones it misses one."""
    s = source(WatchedBank(), L * E, "thread")
    for layer, expert in [(layer, expert) for layer in range(L) for expert in range(E)][absent:]:
        s.request(layer, [expert])
        s.take(layer, [expert])
        s.release(layer, [expert], ready())
    s._loader._copy_s = 1.0
    assert s.wants_prediction(cost) == pays
    s.close()

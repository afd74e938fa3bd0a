"""What moves when, copy by copy: a gated bank holds every copy until the test lets it go."""

import os
import signal
import threading
import time
from typing import Any, cast

import jax
import numpy as np
import pytest

from moe_jax.errors import LoadError
from moe_jax.model.experts import ExpertWeights
from tests.offload.rig import (
    BANK,
    Computation,
    E,
    L,
    WatchedBank,
    check_contents,
    eventually,
    predictions,
    ready,
    source,
    within,
)

BOTH = pytest.mark.parametrize("mode", ["thread", "inline"])


@pytest.fixture
def opened():
    """Closes what a test opened, letting gated copies go first."""
    sources = []

    def make(bank, *args, **kwargs):
        sources.append((bank, source(bank, *args, **kwargs)))
        return sources[-1][1]

    yield make
    for bank, made in sources:
        bank.let(100)
        within(5, made.close)


def use(s, layer, experts, after=None):
    """A whole layer: request, take, check, release; returns the outcomes."""
    s.request(layer, experts)
    outcomes = s.trace.steps()[-1].outcomes
    weights = within(5, s.take, layer, experts)
    for expert, one in zip(experts, weights, strict=True):
        check_contents((layer, expert), one)
    s.release(layer, experts, after or ready())
    return outcomes


def warm(s, *keys):
    for layer, expert in keys:
        use(s, layer, [expert])


def test_demand_comes_before_speculation_and_one_speculation_is_in_flight(opened):
    bank = WatchedBank(8, gated=True)
    s = opened(bank, 8, "thread")
    s.offer(0, predictions({1: 0.9, 2: 0.85, 3: 0.8}))
    bank.wait_started()
    time.sleep(0.02)
    assert bank.copied == [(1, 1)]
    s.request(0, [4, 5])
    bank.let(5)
    eventually(lambda: len(bank.copied) == 5)
    assert bank.copied == [(1, 1), (0, 4), (0, 5), (1, 2), (1, 3)]


def test_inline_issues_demands_then_one_speculation_at_each_boundary(opened):
    bank = WatchedBank(8)
    s = opened(bank, 8, "inline", delay=lambda key: 0.01)
    s.request(0, [4, 5])
    s.offer(0, predictions({1: 0.9, 2: 0.8}))
    assert bank.copied == [(0, 4), (0, 5), (1, 1)]
    s.offer(0, predictions({1: 0.9, 2: 0.8}))
    assert bank.copied == [(0, 4), (0, 5), (1, 1)]
    time.sleep(0.05)
    s.offer(0, predictions({1: 0.9, 2: 0.8}))
    assert bank.copied[3:] == [(1, 2)]


@BOTH
def test_outcomes_of_speculation(opened, mode):
    bank = WatchedBank(8)
    s = opened(bank, 8, mode)
    assert use(s, 0, [0, 1]) == ("missed", "missed")
    s.offer(0, predictions({2: 0.9}))
    eventually(lambda: s._loader._poll() or (1, 2) in s.store.resident)
    assert use(s, 1, [2, 3]) == ("prefetched", "missed")
    assert use(s, 1, [3, 2]) == ("cached", "cached")  # only the first use is prefetched
    assert [(load.cause, load.used) for load in s.trace.loads] == [
        ("demand", True), ("demand", True), ("speculative", True), ("demand", True),
    ]  # fmt: skip


def test_a_speculated_expert_still_on_its_way_is_late_and_not_loaded_twice(opened):
    bank = WatchedBank(8, gated=True)
    s = opened(bank, 8, "thread")
    s.offer(0, predictions({2: 0.9}))
    bank.wait_started()
    s._loader._copy_s = 1000.0  # what a load takes is not known yet
    assert s.request(1, [3, 2]) == [2, 3]  # what is on its way comes first
    assert s.trace.steps()[-1].outcomes == ("missed", "late")
    assert 0 < s._loader.benefit._hidden < 1000  # the wait is the shorter for what is on its way, and no more
    threading.Timer(0.02, bank.let, (2,)).start()
    check_contents((1, 2), within(5, s.take, 1, [2])[0])
    assert bank.copied[0] == (1, 2) and bank.copied.count((1, 2)) == 1
    assert s.trace.steps()[-1].stall_s > 0


@BOTH
def test_speculation_is_dropped_when_its_layer_has_passed(opened, mode):
    bank = WatchedBank(8)
    s = opened(bank, 8, mode, delay=lambda key: 0.02)
    s.request(0, [0])
    s.offer(0, predictions({1: 0.9, 2: 0.85}, {3: 0.8}))  # the link is busy with (0, 0)
    s.request(1, [5])
    within(5, s.take, 1, [5])
    for _ in range(20):
        time.sleep(0.005)
        s.offer(1, predictions({3: 0.8}))
    assert (2, 3) in bank.copied and (1, 2) not in bank.copied


@BOTH
def test_nothing_is_speculated_that_the_next_layers_experts_would_evict(opened, mode):
    bank = WatchedBank(2)
    s = opened(bank, 2, mode)
    assert use(s, 0, [0, 1]) == ("missed", "missed")  # fill the store, as the next layer's will
    s.offer(0, predictions({2: 0.9}, {3: 1.0}))
    eventually(lambda: s._loader._poll() or (1, 2) in s.store.resident)
    time.sleep(0.02)
    assert (2, 3) not in bank.copied
    assert use(s, 1, [2]) == ("prefetched",)  # a layer that needs one leaves room
    s.offer(1, predictions({}, {3: 1.0}))
    eventually(lambda: s._loader._poll() or (0, 3) in s.store.resident)


@BOTH
def test_speculation_evicts_only_what_is_expected_to_be_worth_less(opened, mode):
    bank = WatchedBank(2)
    s = opened(bank, 2, mode)
    warm(s, (1, 0), (2, 0))
    s.request(0, [])
    s.offer(0, predictions({0: 0.7, 1: 0.65}, {0: 0.9, 1: 0.8}))
    eventually(lambda: s._loader._poll() or (2, 1) in s.store.resident)
    assert set(s.store.resident) == {(2, 0), (2, 1)}  # (1, 0), worth 0.7, went, and (1, 1) is worth less than both
    s.offer(0, predictions({0: 0.7, 1: 0.65}, {0: 0.9, 1: 0.8}))
    time.sleep(0.02)
    assert set(s.store.resident) == {(2, 0), (2, 1)} and len(bank.copied) == 3
    s.offer(0, predictions({0: 0.95}, {0: 1.0, 1: 0.1}))  # what was evicted may come back
    eventually(lambda: s._loader._poll() or set(s.store.resident) == {(1, 0), (2, 0)})


@BOTH
def test_a_speculated_expert_is_as_recent_as_a_used_one(opened, mode):
    bank = WatchedBank(3)
    s = opened(bank, 3, mode)
    warm(s, (0, 0), (0, 1))
    s.offer(0, predictions({2: 0.9}))
    eventually(lambda: s._loader._poll() or (1, 2) in s.store.resident)
    warm(s, (2, 4))
    assert set(s.store.resident) == {(0, 1), (1, 2), (2, 4)} and len(bank.copied) == 4


@BOTH
def test_room_is_made_even_after_an_interrupted_step(opened, mode):
    bank = WatchedBank(2)
    s = opened(bank, 2, mode)
    s.request(0, [0, 1, 2, 3])
    within(5, s.take, 0, [0, 1])  # never released
    within(5, s._loader.make_room, 2)
    assert s.store.used_bytes == 0
    time.sleep(0.02)
    assert bank.count() == 0 and s.link_bytes_per_s(1) > 0


@BOTH
def test_speculation_spares_what_is_pinned_pending_or_in_use(opened, mode):
    bank = WatchedBank(3)
    s = opened(bank, 3, mode)
    warm(s, (0, 0), (0, 1))
    running = Computation()
    use(s, 0, [2], after=running)  # in use
    s.request(0, [0, 1])
    within(5, s.take, 0, [0])  # pinned; (0, 1) is pending
    s.offer(0, predictions({5: 1.0}))
    time.sleep(0.02)
    assert (1, 5) not in bank.copied
    running.end()
    s.offer(0, predictions({5: 1.0}))
    eventually(lambda: s._loader._poll() or (1, 5) in s.store.resident)
    assert set(s.store.resident) == {(0, 0), (0, 1), (1, 5)}
    s.release(0, [0], ready())


@pytest.mark.parametrize("asked", [None, [0, 2, 3]])
def test_what_is_borrowed_is_there_and_stays(opened, asked):
    bank = WatchedBank(3)
    s = opened(bank, 3, "thread")
    warm(s, (0, 0), (0, 1), (1, 2))
    assert s.borrow(2, asked) is None  # there is nothing of layer 2
    lent = s.borrow(1, asked)
    assert lent.experts.tolist() == [expert if expert == 2 else -1 for expert in asked or range(E)]
    for weights in lent.weights:
        check_contents((1, 2), weights)
    use(s, 0, [2, 3])  # takes the place of what is not borrowed
    assert {(1, 2), (0, 2), (0, 3)} == set(s.store.resident) and not bank.excess
    with pytest.raises(RuntimeError, match="3 experts are taken while 1 are not released"):
        s.request(2, [0, 1, 2])
        s.take(2, [0, 1, 2])
    s.give_back(1, [], ready())
    use(s, 2, [0, 1, 2])


def test_only_what_is_asked_for_is_lent(opened):
    s = opened(WatchedBank(3), 3, "thread")
    warm(s, (1, 0), (1, 1), (1, 2))
    lent = s.borrow(1, [2, 1])
    assert lent.experts.tolist() == [2, 1]
    for expert, weights in zip([2, 1], lent.weights, strict=True):
        check_contents((1, expert), weights)
    use(s, 0, [5])
    assert set(s.store.resident) == {(0, 5), (1, 1), (1, 2)}


def test_what_is_borrowed_counts_as_used_only_if_it_is_needed(opened):
    s = opened(WatchedBank(), L * E, "thread")
    for expert in (0, 1):
        s.offer(0, predictions({expert: 1}))
        eventually(lambda expert=expert: (1, expert) in s.store.resident)
    s.borrow(1)
    s.request(1, [0])
    s.give_back(1, [0], ready())
    assert s.trace.steps()[-1].outcomes == ("prefetched",)
    assert {load.expert: load.used for load in s.trace.loads} == {0: True, 1: False}
    use(s, 0, [2])
    s.request(1, [0, 1])
    assert s.trace.steps()[-1].outcomes == ("cached", "prefetched")


def test_a_demand_goes_on_when_what_was_borrowed_in_vain_is_given_back(opened):
    """The smallest budget: what is borrowed is all there is, and nothing of it is needed."""
    bank = WatchedBank(2)
    s = opened(bank, 2, "thread")
    warm(s, (1, 0), (1, 1))
    assert s.borrow(1).experts.tolist() == [0, 1, *[-1] * (E - 2)]
    computing = Computation()
    s.request(1, [2, 3])
    s.give_back(1, [], computing)
    time.sleep(0.02)
    assert (1, 2) not in bank.copied  # what was lent is computed with: its bytes count
    threading.Timer(0.05, computing.end).start()
    for expert in (2, 3):
        [weights] = within(5, s.take, 1, [expert])
        check_contents((1, expert), weights)
        s.release(1, [expert], ready())


def test_speculation_does_not_wait_for_what_was_lent(opened):
    bank = WatchedBank(3)
    s = opened(bank, 3, "thread")
    warm(s, (0, 0), (0, 1), (2, 2))
    s.borrow(0)
    s.request(0, [0])
    s.give_back(0, [0], computing := Computation())
    s.offer(0, predictions({4: 1.0}))
    eventually(lambda: (1, 4) in s.store.resident)
    assert set(s.store.resident) == {(0, 0), (0, 1), (1, 4)}
    s.offer(0, predictions({4: 1.0, 5: 1.0}))
    time.sleep(0.02)
    assert (1, 5) not in bank.copied
    computing.end()
    s.offer(0, predictions({4: 1.0, 5: 1.0}))
    eventually(lambda: (1, 5) in s.store.resident)


def test_what_is_lent_is_not_taken_before_it_is_back(opened):
    s = opened(WatchedBank(3), 3, "thread")
    warm(s, (1, 0))
    s.borrow(1)
    s.request(1, [0])
    with pytest.raises(RuntimeError, match=r"\(1, 0\) is taken before what was borrowed of its layer is given back"):
        s.take(1, [0])
    s.give_back(1, [], ready())
    use(s, 1, [0])


def test_pins_of_an_interrupted_step_are_dropped_with_what_it_borrowed(opened):
    s = opened(WatchedBank(2), 2, "thread")
    warm(s, (1, 0), (1, 1))
    s.borrow(1)
    s.begin_token(1)
    use(s, 0, [2, 3])
    use(s, 1, [0, 1])


def test_inline_lends_nothing_as_the_layers_copies_are_to_come(opened):
    assert not opened(WatchedBank(), L * E, "inline").lends
    assert opened(WatchedBank(), L * E, "thread").lends


def test_an_accelerator_is_lent_nothing_as_another_executable_may_round_otherwise(opened, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not opened(WatchedBank(), L * E, "thread").lends


def test_inline_a_copy_takes_what_its_layer_would_wait_for(opened):
    bank = WatchedBank(8)
    s = opened(bank, 8, "inline", delay=lambda key: 0.3)
    copy = bank.copy
    bank.copy = lambda key: time.sleep(0.2) or copy(key)  # to issue it costs the same whenever that is done
    use(s, 0, [4])
    assert s._loader._copy_s < 0.25  # of 0.3
    before = s._loader._copy_s
    s.offer(0, predictions({1: 0.9}))
    time.sleep(0.6)  # it has arrived long before it is noticed
    s.request(1, [1])
    assert s._loader._copy_s < before + 1e-6


def on_its_way(weights):
    """The same arrays, a few tenths of a second later: a computation that the device has only begun."""
    return jax.tree.map(lambda x: _later(x, np.full((1000, 1000), 1e-3, np.float32)), weights)


@jax.jit
def _later(x, square):
    spent = jax.lax.fori_loop(0, 30, lambda _, y: y @ square, square)
    return jax.numpy.where(spent[0, 0] < 0, 0.0, x)


def test_inline_hands_out_what_is_on_its_way_and_waits_only_when_the_host_has_to(opened):
    bank = WatchedBank(8)
    s = opened(bank, 8, "inline")
    jax.block_until_ready(on_its_way(BANK.copy((0, 0))))  # compiled
    copy = bank.copy
    bank.copy = lambda key: on_its_way(copy(key))
    s.request(0, [4])
    [weights] = s.take(0, [4])
    stalled = lambda: s.trace.steps()[-1].stall_s
    assert not weights.down.is_ready() and stalled() < 0.02
    twice = jax.numpy.add(weights.down, weights.down)  # the device waits by itself
    s.release(0, [4], twice)
    load = s.trace.loads[-1]
    assert not load.t_done and s.ready(0, [4])
    s.settle()
    assert weights.down.is_ready() and stalled() > 0.02 and s._loader._copy_s > 0.02 and load.t_done
    assert s._loader.benefit._stall == pytest.approx(stalled())
    check_contents((0, 4), weights)
    s.settle()
    assert len(s.trace.loads) == 1 and not s._loader._handed
    # What has arrived by the time the host has to wait has cost nothing; so much is what speculation could spare.
    before = s._loader._copy_s
    s.request(0, [5])
    [weights] = s.take(0, [5])
    s.release(0, [5], weights.down)
    jax.block_until_ready(weights)
    s.settle()
    assert s._loader._copy_s < 0.95 * before
    # Noticed without settling too, and forgotten with what leaves before it is noticed.
    s.request(0, [3])
    s.release(0, [3], s.take(0, [3])[0].down)
    eventually(lambda: s._loader._poll() or s.trace.loads[-1].t_done)
    s.request(0, [2])
    s.release(0, [2], s.take(0, [2])[0].down)
    within(5, s._loader.make_room, 8)
    assert not s._loader._handed and s.store.used_bytes == 0
    s.settle()


def test_inline_a_copy_that_fails_on_its_way_is_named_and_can_be_had_again(opened, monkeypatch):
    s = opened(WatchedBank(2), 2, "inline")
    with monkeypatch.context() as patch:
        patch.setattr("moe_jax.offload.inline._all_ready", lambda weights: False)
        s.request(1, [3])
        s.release(1, [3], s.take(1, [3])[0].down)
        patch.setattr(jax, "block_until_ready", lambda weights: 1 / 0)
        with pytest.raises(LoadError, match="loading layer 1 expert 3 failed: division by zero"):
            s.settle()
    within(5, s.settle)
    assert use(s, 1, [3]) == ("missed",)


@BOTH
def test_bytes_count_until_the_last_use_has_completed(opened, mode):
    bank = WatchedBank(2)
    s = opened(bank, 2, mode)
    warm(s, (0, 0))
    running = Computation()
    use(s, 0, [1], after=running)
    s.request(1, [0, 1])
    done = []
    taker = threading.Thread(target=lambda: done.append(s.take(1, [0, 1])))
    taker.start()
    time.sleep(0.05)
    assert not done and (1, 1) not in bank.copied  # (0, 1) still takes its place
    running.end()
    taker.join(5)
    assert done and not bank.excess
    s.release(1, [0, 1], ready())


@BOTH
def test_a_queued_demand_waits_rather_than_evicting_what_is_still_to_be_taken(opened, mode):
    bank = WatchedBank(2)
    s = opened(bank, 2, mode)
    warm(s, (0, 0), (0, 1))
    assert s.request(0, [3, 0, 4, 1]) == [0, 1, 3, 4]
    time.sleep(0.02)
    assert len(bank.copied) == 2
    for group in ([0, 1], [3, 4]):
        for expert, weights in zip(group, within(5, s.take, 0, group), strict=True):
            check_contents((0, expert), weights)
        del weights
        s.release(0, group, ready())
    assert sorted(bank.copied) == [(0, 0), (0, 1), (0, 3), (0, 4)]


@BOTH
def test_a_release_lets_queued_demands_go_on(opened, mode):
    bank = WatchedBank(2)
    s = opened(bank, 2, mode)
    warm(s, (0, 0), (0, 1))
    s.request(0, [0, 1, 3, 4])
    within(5, s.take, 0, [0, 1])
    time.sleep(0.02)
    s.release(0, [0, 1], ready())
    eventually(lambda: bank.copied[2:] == [(0, 3), (0, 4)])


@BOTH
@pytest.mark.parametrize("needed", [[0, 1, 2, 3], [2, 3, 0, 1]])
def test_a_blocked_take_evicts_what_is_pending_and_it_is_loaded_again(opened, mode, needed):
    bank = WatchedBank(2)
    s = opened(bank, 2, mode)
    warm(s, (0, 0), (0, 1))
    s.request(0, needed)
    for group in ([2, 3], [0, 1]):  # against the order advised
        for expert, weights in zip(group, within(5, s.take, 0, group), strict=True):
            check_contents((0, expert), weights)
        del weights
        s.release(0, group, ready())
        eventually(lambda: len(bank.copied) == 6)  # queued again at once, without another take
    assert sorted(bank.copied[2:]) == [(0, 0), (0, 1), (0, 2), (0, 3)] and not bank.excess


@BOTH
def test_taking_more_than_fits_is_an_error_and_no_deadlock(opened, mode):
    s = opened(WatchedBank(2), 2, mode)
    s.request(0, [0, 1, 2])
    within(5, s.take, 0, [0, 1])
    with pytest.raises(RuntimeError, match="not released"):
        within(5, s.take, 0, [2])
    s.release(0, [0, 1], ready())
    check_contents((0, 2), within(5, s.take, 0, [2])[0])


@BOTH
def test_a_failing_copy_surfaces_in_take_and_can_be_tried_again(opened, mode):
    bank = WatchedBank(2)
    s = opened(bank, 2, mode)
    bank.fail = {(0, 1)}
    s.request(0, [0, 1])
    with pytest.raises(LoadError, match="layer 0 expert 1 .* on fire"):
        within(5, s.take, 0, [0, 1])
    check_contents((0, 0), within(5, s.take, 0, [0])[0])
    s.release(0, [0], ready())
    bank.fail = set()
    check_contents((0, 1), within(5, s.take, 0, [1])[0])
    s.release(0, [1], ready())
    assert s.store.used_bytes == bank.count() * bank.expert_bytes


def test_a_failing_copy_wakes_a_take_that_waits_already(opened):
    bank = WatchedBank(2, gated=True)
    s = opened(bank, 2, "thread")
    bank.fail = {(0, 1)}
    s.request(0, [1])
    threading.Timer(0.05, bank.let).start()
    with pytest.raises(LoadError, match="expert 1"):
        within(3, s.take, 0, [1])


@BOTH
def test_a_failure_is_forgotten_by_the_next_request(opened, mode):
    bank = WatchedBank(2)
    s = opened(bank, 2, mode)
    bank.fail = {(0, 1)}
    s.request(0, [1])
    eventually(lambda: s._loader._failures)
    bank.fail = set()
    assert use(s, 0, [1]) == ("missed",)


@BOTH
def test_arrays_of_a_copy_that_failed_half_way_are_freed(opened, mode):
    class Broken:
        def is_ready(self):
            return True

        def block_until_ready(self):
            raise OSError("half of it is missing")

    class HalfBank(WatchedBank):
        def copy(self, key):
            return ExpertWeights(super().copy(key).gate_up, cast(Any, Broken()))

    bank = HalfBank(2)
    s = opened(bank, 2, mode)
    s.request(0, [1])

    def take_and_settle():  # inline, what is on its way is handed out
        after = s.take(0, [1])[0].gate_up
        s.release(0, [1], jax.numpy.sum(after))
        del after
        s.settle()

    with pytest.raises(LoadError, match="half of it is missing") as error:
        within(5, take_and_settle)
    assert error.value.__cause__ is not None  # and its traceback keeps no array
    assert bank.count() == 0 == s.store.used_bytes


@BOTH
def test_a_new_request_drops_what_the_one_before_has_not_issued(opened, mode):
    bank = WatchedBank(2, gated=mode == "thread")
    s = opened(bank, 2, mode)
    if mode == "inline":
        warm(s, (2, 0))
        within(5, s.take, 2, [0])  # one place is left
    s.request(0, [1, 2])
    bank.wait_started()
    s.request(1, [3])
    bank.let(9)
    if mode == "inline":
        s.release(2, [0], ready())
    check_contents((1, 3), within(5, s.take, 1, [3])[0])
    assert (0, 1) in bank.copied and (0, 2) not in bank.copied


@BOTH
def test_a_failing_speculation_is_not_repeated_and_harms_nobody(opened, mode):
    bank = WatchedBank(8)
    s = opened(bank, 8, mode)
    bank.fail = {(1, 3)}
    s.offer(0, predictions({3: 0.9, 4: 0.8}))
    eventually(lambda: s._loader._poll() or (1, 4) in s.store.resident)
    assert bank.copied == [(1, 3), (1, 4)]
    bank.fail = set()
    assert use(s, 1, [3, 4]) == ("missed", "prefetched")


def test_a_crash_of_the_copy_thread_surfaces(opened, monkeypatch):
    s = opened(WatchedBank(2), 2, "thread")
    monkeypatch.setattr(s._loader, "_arrive", lambda *_: 1 / 0)
    s.request(0, [0])
    with pytest.raises(RuntimeError, match="ended unexpectedly"):
        within(5, s.take, 0, [0])


def test_an_interrupted_take_leaves_the_source_usable_and_closable(opened):
    bank = WatchedBank(2, gated=True)
    s = opened(bank, 2, "thread")
    s.request(0, [0, 1])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us with &
    try:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            s.take(0, [0, 1])
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    bank.let(2)
    check_contents((0, 1), within(5, s.take, 0, [0, 1])[1])
    s.begin_token(0)  # what was taken and never released does not stay pinned
    bank.let(2)
    use(s, 1, [0, 1])
    within(5, s.close)
    assert not any(thread.is_alive() for thread in s._loader._threads)


@pytest.mark.parametrize("where", ["copy", "_all_ready"])
def test_inline_a_copy_that_ctrl_c_has_lost_takes_no_room(opened, monkeypatch, where):
    """`device_put` is Python for the most part, and the decode thread is where Ctrl-C comes."""
    s = opened(WatchedBank(2), 2, "inline")
    owner = s.bank if where == "copy" else "moe_jax.offload.inline"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        target = (owner, where) if where == "copy" else (f"{owner}.{where}",)
        patch.setattr(*target, lambda *_: signal.raise_signal(signal.SIGINT))
        s.request(0, [0, 1])
        s._loader._poll()
    assert within(5, s.resident) is not None
    within(5, s._loader.make_room, 2)
    s.begin_token(0)
    assert use(s, 0, [0, 1]) == ("missed", "missed") and use(s, 0, [1]) == ("cached",)


@BOTH
def test_close_ends_everything(opened, mode):
    bank = WatchedBank(4)
    s = opened(bank, 4, mode, delay=lambda key: 30.0 if key == (1, 1) else 0.0)
    use(s, 0, [0, 1])
    s.offer(0, predictions({1: 0.9}))
    eventually(lambda: (1, 1) in bank.copied)
    within(5, s.close)  # does not sit out the delay
    within(5, s.close)
    s.release(0, [0], ready())  # of a step that was interrupted: nothing to do
    with pytest.raises(RuntimeError, match="closed"):
        s.request(0, [0])
    with pytest.raises(RuntimeError, match="closed"):
        s.take(0, [0])
    assert bank.count() == 0


def test_close_wakes_a_blocked_take(opened):
    bank = WatchedBank(2, gated=True)
    s = opened(bank, 2, "thread")
    s.request(0, [0])
    closer = threading.Timer(0.05, s.close)
    closer.start()
    with pytest.raises(RuntimeError, match="closed"):
        within(3, s.take, 0, [0])  # though the copy never ends
    bank.let()
    closer.join()


@BOTH
def test_a_simulated_link_takes_its_time(opened, mode):
    seconds = 0.03
    s = opened(WatchedBank(4), 4, mode, link_gbps=BANK.expert_bytes / seconds / 1e9)
    began = time.perf_counter()
    use(s, 0, [0, 1])
    assert time.perf_counter() - began >= 2 * seconds
    first, second = s.trace.loads
    assert first.t_done - first.t_issue >= seconds and second.t_done - began >= 2 * seconds

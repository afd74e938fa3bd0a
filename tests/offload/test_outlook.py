"""What is worth a speculative copy."""

from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from moe_jax.offload.history import SHARE, YOUNG, History
from moe_jax.offload.keys import KeySet
from moe_jax.offload.outlook import LEAST, LEAST_RATE, TAKEN, TRUST, WRONG, Outlook
from tests.offload.rig import E, K, L, predictions


def outlook():
    return Outlook(L, E, K)


def table(*keys):
    found = np.zeros((L, E), bool)
    for key in keys:
        found[key] = True
    return found


def test_nothing_is_worth_a_copy_before_a_prediction():
    assert outlook().best(0) is None


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        ([{1: 0.9, 2: 0.8}], (1, 1)),
        ([{1: 0.8}, {2: 0.95}], (1, 1)),  # the nearest, though a farther one is likelier
        ([{1: 0.3}, {2: 0.8, 3: 0.9}], (2, 3)),  # if it is likely enough
        ([{}, {}, {3: 0.9}], (0, 3)),  # wraps into the next token
        ([{1: K / E}], None),  # no better than the prior
        ([{}], None),
    ],
)
def test_best(ahead, expected):
    o = outlook()
    o.offer(0, predictions(*ahead))
    best = o.best(0)
    assert (best and best[0]) == expected
    if best:
        assert best[1] == pytest.approx(ahead[(best[0][0] - 1) % L][best[0][1]])


def test_predictions_of_the_last_layers_wrap():
    o = outlook()
    o.offer(L - 1, predictions({1: 0.9}, {2: 0.8}))
    assert o.best(L - 1) == ((0, 1), pytest.approx(0.9))
    o.hold((0, 1), True)
    assert o.best(L - 1) == ((1, 2), pytest.approx(0.8))


def test_layer_minus_one_is_before_layer_0():
    o = outlook()
    o.offer(-1, predictions({1: 0.9}, {2: 0.8}))
    assert o.best(L - 1) == ((0, 1), pytest.approx(0.9))
    o.passed(0)
    assert o.best(0) == ((1, 2), pytest.approx(0.8))


def test_what_is_held_is_no_candidate_until_it_is_gone():
    o = outlook()
    o.offer(0, predictions({1: 0.9, 2: 0.8}))
    o.hold((1, 1), True)
    assert o.best(0) == ((1, 2), pytest.approx(0.8))
    o.hold((1, 1), False)
    assert o.best(0) == ((1, 1), pytest.approx(0.9))


def test_a_layer_that_has_passed_is_dropped_and_falls_back_to_the_prior():
    o = outlook()
    o.offer(0, predictions({1: 0.9}, {2: 0.8}))
    assert list(KeySet(o.below(table((1, 1), (1, 2), (2, 2)), 0.5))) == [(1, 2)]
    o.passed(1)
    assert o.best(1) == ((2, 2), pytest.approx(0.8))
    assert not o.below(table((1, 1), (1, 2)), K / E).any()  # exactly the prior
    assert list(KeySet(o.below(table((1, 1), (1, 2)), K / E + 0.01))) == [(1, 1), (1, 2)]


def test_a_new_prediction_replaces_the_one_before():
    o = outlook()
    o.offer(0, predictions({1: 0.9}, {2: 0.8}))
    o.offer(1, predictions({3: 0.78}))
    assert o.best(1) == ((2, 3), pytest.approx(0.78))
    o.hold((2, 3), True)
    assert o.best(1) == ((1, 1), pytest.approx(0.9))  # layer 1 has not passed here
    o.passed(1)
    assert o.best(1) is None


def test_a_horizon_longer_than_the_model_is_cut():
    o = outlook()
    o.offer(0, predictions({1: 0.8}, {}, {}, {1: 0.9}))
    assert o.best(0) == ((1, 1), pytest.approx(0.8))


def test_what_would_be_evicted_before_its_layer_is_no_candidate():
    o = outlook()
    o.offer(0, predictions({1: 0.3}, {2: 0.9}))
    assert o.best(0) == ((2, 2), pytest.approx(0.9))
    assert o.best(0, reach=2) == ((2, 2), pytest.approx(0.9))
    assert o.best(0, reach=1) is None


def test_there_may_be_work_while_something_likely_is_absent():
    o = outlook()
    o.offer(0, predictions({1: 0.9}, {2: 0.4}))
    assert o.any_likely()
    o.hold((1, 1), True)
    assert not o.any_likely()
    o.hold((1, 1), False)
    o.passed(1)
    assert not o.any_likely()


def test_what_is_not_likely_enough_is_no_candidate():
    o = outlook()
    floor = (WRONG + TAKEN) / (1 + WRONG + TAKEN)  # a busy link
    o.offer(0, predictions({1: floor - 0.01}, {2: floor + 0.01}))
    assert o.best(0) == ((2, 2), pytest.approx(floor + 0.01))
    assert o.likely((2, 2)) and not o.likely((1, 1))
    o.passed(2)
    assert o.best(0) is None and not o.likely((2, 2))


def test_the_less_busy_the_link_the_less_likely_a_load_may_be():
    o = outlook()
    o.offer(0, predictions({1: 0.7}))
    assert o.best(0) is None
    o.busy(0.2)
    assert o.best(0) == ((1, 1), pytest.approx(0.7)) and o.likely((1, 1))
    o.busy(1.0)
    assert o.best(0) is None and not o.likely((1, 1))


def run(o, *experts):
    """A token that uses these, one pair per layer."""
    for layer, pair in enumerate(experts):
        o.passed(layer, list(pair))


def test_recent_use_corrects_what_is_not_certain():
    o = outlook()
    for _ in range(48):
        run(o, (0, 1), (1, 2), (0, 3))
    o.offer(0, predictions({0: 1.0, 1: 0.8, 3: 0.8}, {3: 0.72, 2: 0.72}))
    assert o.likely((1, 0)) and o.likely((1, 1)) and not o.likely((1, 3))
    assert o.best(0) == ((1, 0), pytest.approx(1.0))  # the prediction knows
    o.hold((1, 0), True)
    assert o.best(0) == ((1, 1), pytest.approx(0.99, abs=0.009))
    o.hold((1, 1), True)
    assert o.best(0) == ((2, 3), pytest.approx(0.98, abs=0.02)) and not o.likely((2, 2))
    o.offer(0, predictions({1: 0.0}))
    assert o.below(table((1, 1)), 1e-6).any()


def test_layers_of_the_running_and_of_the_next_token_are_corrected_by_their_own():
    o, h = outlook(), History(L, E, K / E)
    for token in 5 * [[(0, 1)] * L, [(1, 2)] * L, [(2, 3)] * L, [(0, 3)] * L]:
        run(o, *token)
        for layer, pair in enumerate(token):
            h.add(layer, list(pair))
    first, second, _ = h.chances()
    even = np.full((L, E), 0.3, np.float32)

    def corrected(chance):
        chance = np.clip(chance, LEAST, 1 - LEAST)
        average = chance.mean(-1, keepdims=True)
        odds = (chance / (1 - chance) * ((1 - average) / average)) ** TRUST * 0.3 / 0.7
        return odds / (1 + odds)

    o.offer(L - 1, even)  # the token has ended: all layers are the next one's
    np.testing.assert_allclose(o._likelihood(), corrected(first), rtol=1e-4)
    o.offer(-1, even)
    np.testing.assert_allclose(o._likelihood(), corrected(first), rtol=1e-4)
    o.passed(0, [0, 1])
    o.offer(0, even)
    np.testing.assert_allclose(o._likelihood(), corrected(np.stack([second[0], first[1], first[2]])), rtol=1e-4)


def test_what_a_token_used_is_known_though_nothing_was_predicted_since():
    o = outlook()
    for pair in 4 * [(0, 1), (1, 2), (4, 5)]:
        run(o, *[pair] * L)
    o.passed(0, [0, 1])  # of the next token
    used_by_the_one_after, by_none = o.expected(0, table((1, 2), (1, 3)))
    assert 2 * used_by_the_one_after < by_none


def test_of_a_prompt_every_token_counts_and_what_is_predicted_meanwhile_is_believed():
    o, h = outlook(), History(L, E, K / E)
    for pair in 3 * [(0, 1), (0, 2), (4, 5)]:
        run(o, *[pair] * L)
        for layer in range(L):
            h.add(layer, list(pair))
    o.offer(L - 1, predictions({3: 0.8}))
    assert not o.likely((0, 3))
    used = np.zeros((40, E), bool)
    used[:, 1], used[:20, 3], used[20:, 2] = True, True, True
    for layer in range(L):
        o.passed(layer, [1, 2, 3], used)
        h.add_prompt(layer, used)
        if layer + 1 < L:
            o.offer(layer, predictions({3: 0.8}))
            assert o._likelihood()[layer + 1, 3] == pytest.approx(0.8)
            rates = h.usual()[0, [1, 2, 3]]
            waits = L - layer + (1 - rates) * L / np.maximum(rates, LEAST_RATE * K / E)
            np.testing.assert_allclose(o.expected(layer, table((0, 1), (0, 2), (0, 3))), waits, rtol=1e-5)
    first, _, later = (np.clip(chance[0, [2, 3]], LEAST, 1) for chance in h.chances())
    waits = 1 + (1 - first) * L / np.maximum(later, LEAST_RATE * K / E)
    np.testing.assert_allclose(o.expected(L - 1, table((0, 2), (0, 3))), waits, rtol=1e-5)


def test_where_nothing_is_predicted_the_text_says_what_its_next_turn_needs():
    o, h = outlook(), History(L, E, K / E)
    for pair in 5 * [(0, 1), (1, 2), (4, 5)]:
        run(o, *[pair] * L)
        for layer in range(L):
            h.add(layer, list(pair))
    o.passed(0, [0, 1])
    first, second, _ = h.chances()
    assert first[1, 0] > 0.9 > 0.1 > first[1, 2] and second[0, 2] > 0.9 > 0.1 > second[0, 0]
    everything = np.ones((L, E), bool)
    likely = ~o.below(everything, 0.9)
    assert list(KeySet(likely)) == [(0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert o.best(0) is None and not o.any_likely() and not o.likely((1, 0))  # that alone is no reason to load
    o.offer(0, predictions({3: 1.0, 0: 0.0}))
    assert list(KeySet(~o.below(everything, 0.9))) == [(0, 1), (0, 2), (1, 3), (2, 0), (2, 1)]
    o.clear()
    assert list(KeySet(~o.below(everything, 0.9))) == list(KeySet(likely))
    o.passed(1, [0, 1])
    o.passed(2, [0, 1])
    assert {(layer, e) for layer in range(L) for e in (1, 2)} == set(KeySet(~o.below(everything, 0.9)))


def test_expected_next_use():
    o = outlook()
    prior = K / E
    # One layer ahead, two, and a whole token: each at its prior, else the token after, one in 1 / prior of which.
    keys = table((2, 0), (0, 0), (1, 0))  # in the table's order: layers 0, 1, 2
    np.testing.assert_allclose(o.expected(1, keys), np.array([2, 3, 1]) + (1 - prior) * L / prior)
    o.offer(1, predictions({0: 1.0}, {0: 0.75}))
    np.testing.assert_allclose(o.expected(1, table((2, 0), (0, 0))), [2 + 0.25 * L / prior, 1])


def test_experts_in_use_are_expected_sooner():
    o = outlook()
    for _ in range(3):
        run(o, (1, 2), (0, 1), (0, 1))
    left = np.prod([1 - 1 / (YOUNG + age) for age in range(3)])
    rates = [SHARE * (left * K / E + used * (1 - left)) + (1 - SHARE) * K / E for used in (1, 0)]
    waits = [2 + (1 - rate) * L / rate for rate in rates]
    np.testing.assert_allclose(o.expected(1, table((0, 1), (0, 3))), waits, rtol=1e-5)


def test_what_is_never_used_is_expected_at_last_after_a_while():
    o = outlook()
    for _ in range(200):
        run(o, (1, 2), (1, 2), (1, 2))
    assert o.expected(0, table((1, 3))) == pytest.approx([1 + (1 - LEAST) * L / (LEAST_RATE * K / E)])


@settings(max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("pass"), st.integers(0, L - 1)),
            st.tuples(st.just("offer"), st.integers(-1, L - 1), st.integers(1, L + 1), st.integers(0, 99)),
        ),
        max_size=12,
    ),
)
def test_it_does_not_matter_when_what_is_offered_is_booked(events):
    """In the usual order of layers and in any other."""
    at_once, later = outlook(), outlook()
    with mock.patch(
        "moe_jax.offload.outlook.TRUST", 0.0
    ):  # what the text has used so far counts as of when it is booked
        for event, layer, *rest in events:
            for o in (at_once, later):
                if event == "pass":
                    o.passed(layer, [0, 1])
                else:
                    o.offer(layer, np.random.default_rng(rest[1]).random((rest[0], E), np.float32))
            at_once.likely((0, 0))  # books
        for layer in range(L):
            assert at_once.best(layer) == later.best(layer)
    np.testing.assert_array_equal(at_once._value, later._value)
    np.testing.assert_array_equal(at_once._said, later._said)


def test_offered_arrays_are_not_aliased():
    o = outlook()
    table = predictions({1: 0.9})
    o.offer(0, table)
    table[:] = np.nan
    assert o.best(0) == ((1, 1), pytest.approx(0.9))


def test_where_experts_are_many_rare_ones_are_told_from_the_average():
    o = Outlook(L, 64, 1)  # an average expert is used by one token in 64
    for t in range(150):
        for layer in range(L):
            o.passed(layer, [t % 16])
    often, never = o.expected(0, np.isin(np.arange(64), [3, 60]) & (np.arange(L) == 1)[:, None])
    assert 2 * often < never


def test_a_network_says_what_leaves():
    for favourite in (4, 5):
        o = Outlook(L, E, K, lambda averages, e=favourite: np.where(np.arange(E) == e, 0.9, 0.1) + np.zeros((L, 1)))
        for pair in [(0, 1), (2, 3), (1, 2), (0, 3), (0, 2)]:
            run(o, pair, pair, pair)
        assert o.expected(L - 1, table((1, 4), (1, 5))).argmin() == favourite - 4
        used = np.zeros((9, E), bool)
        used[:, :2] = True
        o.passed(0, [0, 1], used)
        assert o.expected(0, table((1, 4), (1, 5))).argmin() == favourite - 4  # while a prompt runs


def test_a_token_that_was_interrupted_leaves_no_turn_behind():
    o = outlook()
    for pair in 5 * [(0, 1), (1, 2), (4, 5)]:
        run(o, *[pair] * L)
    o.passed(0, [0, 1])
    o.passed(1, [0, 1])
    o.passed(0, [0, 1])  # something else begins
    assert list(KeySet(~o.below(np.ones((L, E), bool), 0.9)))[2:] == [(1, 0), (1, 1), (2, 0), (2, 1)]


ASKED = {
    "best": lambda o, layer: o.best(layer),
    "likely": lambda o, layer: [o.likely((layer, expert)) for expert in range(E)],
    "any_likely": lambda o, layer: o.any_likely(),
    "expected": lambda o, layer: o.expected(layer, np.ones((L, E), bool)).tolist(),
    "below": lambda o, layer: o.below(np.ones((L, E), bool), 0.5).tolist(),
    "offer": lambda o, layer: o.offer(layer, predictions({1: 0.9, 2: 0.6}, {3: 0.8})),
    "forget": lambda o, layer: o.forget((layer, 1)),
    "clear": lambda o, layer: o.clear(),
}


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, E - 1), st.sampled_from(["", *ASKED])), min_size=1, max_size=4 * L))
def test_what_has_passed_counts_from_the_next_question_on_whatever_it_is(steps):
    """As if it had been booked at once, by an outlook that is asked after every layer."""
    o, at_once = outlook(), outlook()
    for turn, (expert, question) in enumerate(steps):
        layer = turn % L
        for each in (o, at_once):
            each.passed(layer, [expert, (expert + 1) % E])
        at_once.any_likely()
        if question:
            assert ASKED[question](o, layer) == ASKED[question](at_once, layer)
    assert ASKED["expected"](o, 0) == ASKED["expected"](at_once, 0)

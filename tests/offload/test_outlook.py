"""What is worth a speculative copy."""

import numpy as np
import pytest

from moe_jax.offload.keys import KeySet
from moe_jax.offload.outlook import PRIOR_TOKENS, RATE_TOKENS, RECENT_TOKENS, TAKEN, WRONG, Averages, Outlook
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


def test_recent_use_corrects_what_is_not_certain():
    o = outlook()
    for _ in range(3 * RECENT_TOKENS):
        o.passed(1, [1, 2])
    o.offer(0, predictions({0: 1.0, 1: 0.8, 3: 0.8}, {3: 0.8}))
    assert o.likely((1, 0)) and o.likely((1, 1)) and not o.likely((1, 3))
    assert o.best(0) == ((1, 0), pytest.approx(1.0))  # the prediction knows
    o.hold((1, 0), True)
    assert o.best(0) == ((1, 1), pytest.approx(0.99, abs=0.009))
    o.hold((1, 1), True)
    assert o.best(0) == ((2, 3), pytest.approx(0.8))  # another layer's are not touched
    o.offer(0, predictions({1: 0.0}))
    assert o.below(table((1, 1)), 1e-6).any()


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
    for _ in range(50):
        o.passed(0, [1, 2])
    prior, rates = K / E, [(PRIOR_TOKENS * K / E + uses) / (PRIOR_TOKENS + 50) for uses in (50, 0)]
    rates.append(prior)  # layer 2 has not run
    waits = [ahead + (1 - prior) * L / rate for ahead, rate in zip((2, 2, 1), rates, strict=True)]
    np.testing.assert_allclose(o.expected(1, table((0, 1), (0, 3), (2, 3))), waits, rtol=1e-5)


def test_what_was_used_long_ago_is_forgotten():
    o = outlook()
    for experts in ([1], [2]):
        for _ in range(4 * RATE_TOKENS):
            o.passed(0, experts)
    once, now = o.expected(1, table((0, 1), (0, 2)))
    assert now < 2 + L < 20 * L < once


def test_offered_arrays_are_not_aliased():
    o = outlook()
    table = predictions({1: 0.9})
    o.offer(0, table)
    table[:] = np.nan
    assert o.best(0) == ((1, 1), pytest.approx(0.9))


def test_averages_are_moving_averages_however_long_they_run():
    rng, averages = np.random.default_rng(0), Averages(2, 8, 0.25)
    expected = np.full((2, 8), 0.25)
    for step in range(3000):  # the scale is renewed several times
        layer, experts, tokens = step % 2, rng.choice(8, 2, replace=False).tolist(), 16 if step % 4 < 2 else 40
        averages.add(layer, experts, tokens)
        expected[layer] *= 1 - 1 / tokens
        expected[layer, experts] += 1 / tokens
    np.testing.assert_allclose(averages.values(), expected, rtol=1e-9)

"""The arithmetic of paired runs, and of what a cache must load."""

import itertools

import numpy as np
import pytest

from moe_jax.evaluation import paired
from moe_jax.inference import bounds
from moe_jax.inference.rows import Lists, Rows
from moe_jax.inference.state import Batch, Record


def test_turns_rotate():
    turns = [paired.rotated("abc", turn) for turn in range(6)]
    assert all(sorted(order) == list("abc") for order in turns)
    for place in range(3):  # over a full cycle everybody was everywhere, equally often
        assert sorted(order[place] for order in turns) == sorted("abc" * 2)


def test_ratio_is_paired():
    drift = np.array([1.0, 3.0, 0.5, 7.0, 2.0])
    found = paired.ratio(0.8 * drift, drift)
    assert found == pytest.approx({"value": 0.8, "low": 0.8, "high": 0.8})
    noisy = paired.ratio(drift, drift[::-1])
    assert noisy["low"] < 1 < noisy["high"]


def test_interval_covers_the_mean():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(100):
        values = rng.normal(3.0, 1.0, 30)
        found = paired.interval(lambda turns, values=values: values[turns].mean(), 30)
        inside += found["low"] < 3.0 < found["high"]
    assert 86 <= inside <= 99


@pytest.mark.parametrize("turns", [6, 10])
def test_an_interval_over_few_turns_holds_the_true_ratio_as_often_as_it_says(turns):
    """Percentiles of the resamples alone hold it in 87 and 90% of cases."""
    rng, inside = np.random.default_rng(2), 0
    for _ in range(200):
        found = paired.ratio(np.exp(rng.normal(0.2, 0.3, turns)), np.ones(turns))
        inside += found["low"] < np.exp(0.2) < found["high"]
    assert 0.92 <= inside / 200 <= 0.985


def test_one_turn_is_its_own_interval():
    assert paired.ratio([3.0], [2.0]) == {"value": 1.5, "low": 1.5, "high": 1.5}


def test_means_are_weighted_field_by_field():
    rows = [{"x": {"a": 1.0, "b": None}}, {"x": {"a": 4.0, "b": 2.0}}]
    assert paired.mean_of(rows, [2, 1], "x") == {"a": 2.0, "b": None}


def record_of(prefill, needed, layers):
    record = Record([Batch(0, 64)], prefill, Lists(needed))
    record.active = Rows([np.ones(1, bool)] * (len(needed) // layers))
    return record


def fewest_loads(uses, capacity, free):
    """By trying every choice of what leaves, also what has just been used; the first `free` uses cost nothing."""
    states = {frozenset(): 0}
    for at, key in enumerate(uses):
        following = {}
        for held, loads in states.items():
            cost = loads + (key not in held and at >= free)
            now = held | {key}
            kept = [now] if len(now) <= capacity else [now - {gone} for gone in now]
            for state in kept:
                following[state] = min(cost, following.get(state, cost))
        states = following
    return min(states.values())


@pytest.mark.parametrize("seed", range(8))
def test_belady_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    layers, experts, capacity = 2, 3, int(rng.integers(1, 4))
    prefill = [rng.permutation(experts)[:2].tolist() for _ in range(layers)]
    needed = [rng.permutation(experts)[:2].tolist() for _ in range(layers * 5)]
    record = record_of(prefill, needed, layers)
    uses = [(i % layers, e) for i, step in enumerate(itertools.chain(prefill, needed)) for e in step]
    found = bounds.belady_loads(record, layers, capacity)
    assert found == fewest_loads(uses, capacity, 2 * layers)
    seeing = [bounds.belady_loads(record, layers, capacity, tokens) for tokens in range(7)]
    assert seeing[0] == len(bounds.lru_misses(record, layers, capacity)) >= found
    assert min(seeing) >= found == seeing[6]  # it sees all


@pytest.mark.parametrize(("sees", "loads"), [(0, 3), (1, 3), (2, 2), (3, 2)])
def test_who_sees_less_far_loads_more(sees, loads):
    # One layer, two of 0 to 2 are held: 2 comes in at the second step. 0, which LRU gives up, is needed two later.
    record = record_of([[0, 1]], [[1], [2], [2], [0], [1]], 1)
    assert bounds.belady_loads(record, 1, 2, sees) == loads


def test_lru_misses_by_hand():
    # One layer, budget of two: 0 and 1 are there after the prefill, 0 the older.
    record = record_of([[0, 1]], [[0], [2], [1], [2]], 1)
    assert bounds.lru_misses(record, 1, 2) == [(0, 2), (0, 1)]
    assert bounds.belady_loads(record, 1, 2) == 1  # 0 is never needed again

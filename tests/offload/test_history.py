"""What a text used before, and what has followed where it was in such a place."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.offload import history
from moe_jax.offload.history import ALIKE, CROWDED, FADING, FOLLOWING, NEAREST, SCALES, SHARE, SHARPNESS, YOUNG, History

L, E, K = 3, 8, 2


def tokens_of(numbers, seed=0):
    """The experts of every layer, [L, K], of texts whose tokens are these numbers."""
    rng = np.random.default_rng(seed)
    table = np.array([[rng.permutation(E)[:K] for _ in range(L)] for _ in range(40)])
    return [table[number] for number in numbers]


def add(h, token):
    for layer, experts in enumerate(token):
        h.add(layer, experts.tolist())


def add_prompt(h, tokens):
    for layer in range(L):
        used = np.zeros((len(tokens), E), bool)
        for t, token in enumerate(tokens):
            used[t, token[layer]] = True
        h.add_prompt(layer, used)


def told(numbers, **kwargs):
    h = History(L, E, K / E)
    for token in tokens_of(numbers, **kwargs):
        add(h, token)
    return h


def plain(tokens):
    """The definition, one place after another: `Chances` of the tokens [N, L, K] that are remembered."""
    recent = np.full((L, E), K / E)
    sets = [{(layer, e) for layer in range(L) for e in token[layer].tolist()} for token in tokens]
    for age, used in enumerate(sets):
        share = 1 / min(SCALES[1], age + YOUNG)
        recent *= 1 - share
        for key in used:
            recent[key] += share
    usual = SHARE * recent + (1 - SHARE) * recent.mean(1, keepdims=True)
    last = len(sets) - 1
    if last < 3:
        return usual, usual, usual
    likeness = {}
    for s in range(1, last):
        shared = len(sets[s] & sets[last]) + len(sets[s - 1] & sets[last - 1])
        sizes = [len(sets[s]) + len(sets[s - 1]), len(sets[last]) + len(sets[last - 1])]
        chance = min(sizes) / (2 * L * E)
        likeness[s] = (shared / max(sizes) - chance) / (1 - chance)
    places = sorted(likeness, key=lambda s: -np.exp(np.float32(SHARPNESS) * np.float32(likeness[s] - ALIKE)))[:NEAREST]
    weights = {s: np.exp(SHARPNESS * (likeness[s] - ALIKE)) for s in places}
    total = 1 + sum(weights.values())
    found = [usual / total for _ in range(3)]
    for s in places:
        after = itertools.cycle(sets[s + 1 :])
        following = [next(after) for _ in range(FOLLOWING)]
        counts = [[1.0], [0.0, 1.0], [0.0, *(FADING**k for k in range(FOLLOWING - 1))]]
        for chance, count in zip(found, counts, strict=True):
            for used, c in zip(following, count, strict=False):
                for key in used:
                    chance[key] += weights[s] / total * c / sum(count)
    return found


@given(st.lists(st.integers(0, 4), min_size=1, max_size=25))
def test_chances_are_those_of_the_definition(numbers):
    for ours, theirs in zip(told(numbers).chances(), plain(tokens_of(numbers)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=25), st.integers(0, 25), st.integers(0, 25))
def test_a_prompt_is_as_good_as_its_tokens_one_by_one(numbers, start, length):
    tokens, h = tokens_of(numbers), History(L, E, K / E)
    for token in tokens[:start]:
        add(h, token)
    if prompt := tokens[start : start + length]:
        add_prompt(h, prompt)
    for token in tokens[start + length :]:
        add(h, token)
    for ours, theirs in zip(h.chances(), told(numbers).chances(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def top(chance):
    return np.sort(np.argsort(-chance, axis=-1, kind="stable")[:, :K])


@pytest.mark.parametrize("steps", [[1] * 60, [7, 1, 1, 1] * 6, [30, 5, 5, 20], [5, 43, 1, 1], [16, 16, 1, 9]])
def test_a_text_that_goes_round_is_known_however_long_it_is(monkeypatch, steps):
    monkeypatch.setattr(history, "SIZE", 8)
    h, text, at = History(L, E, K / E), tokens_of(itertools.chain(*[range(5)] * 20)), 0
    for step in steps:
        add_prompt(h, text[at : at + step]) if step > 1 else add(h, text[at])
        at += step
        if at > 7:
            first, second, later = h.chances()
            np.testing.assert_array_equal(top(first), np.sort(text[at]))
            np.testing.assert_array_equal(top(second), np.sort(text[at + 1]))
            assert all(later[layer, text[at + 2][layer]].min() > 0.2 for layer in range(L))


def test_what_is_long_gone_is_not_remembered(monkeypatch):
    monkeypatch.setattr(history, "SIZE", 8)
    for between, known in ((4, True), (20, False)):
        h = told([0, 1, 2, 3, *range(10, 10 + between), 0, 1])
        np.testing.assert_array_equal((top(h.chances().first) == np.sort(tokens_of([2])[0])).all(), known)


def test_of_a_new_text_only_recent_use_is_known():
    h = told(range(12))
    assert all(np.abs(chance - h.usual()).max() < 0.05 for chance in h.chances())


def test_recent_use_fades():
    h = told([0] * 60)
    used = tokens_of([0])[0]
    assert all(h.usual()[layer, used[layer]].min() > 0.55 for layer in range(L))
    for token in tokens_of([1] * 60):
        add(h, token)
    only_before = set(used[0].tolist()) - set(tokens_of([1])[0][0].tolist())
    assert only_before and all(h.usual()[0, e] < 0.15 for e in only_before)


def test_what_was_interrupted_is_forgotten():
    whole, broken = told([0, 1, 2, 0, 1]), told([0, 1, 2, 0, 1])
    token = tokens_of([2])[0]
    broken.add(0, token[0].tolist())
    broken.add(1, [6, 7])
    add(broken, token)
    add(whole, token)
    np.testing.assert_array_equal(broken.chances(), whole.chances())
    half = np.ones((9, E), bool)
    broken.add_prompt(0, half)
    add(broken, token)
    add(whole, token)
    np.testing.assert_array_equal(broken._uses, whole._uses)


def test_an_expert_that_all_places_were_followed_by_is_nearly_certain():
    first = told([0, 1, 2, 3] * 4).chances().first
    assert first[0, tokens_of([0])[0][0]].min() > 0.95


def test_a_layer_that_comes_first_begins_a_token(monkeypatch):
    monkeypatch.setattr(history, "SIZE", 8)
    h = told(itertools.islice(itertools.cycle(range(5)), 16))
    h.add(1, [0, 1])  # the memory is full, and nothing runs
    add(h, tokens_of([1])[0])
    np.testing.assert_array_equal(top(h.chances().first), np.sort(tokens_of([2])[0]))


def test_averages_reach_back_over_their_scales():
    seen = []
    h = History(L, E, K / E, lambda averages: seen.append(averages.copy()) or averages[0])
    rng, expected = np.random.default_rng(2), np.full((len(SCALES), L, E), K / E)
    for age in range(150):
        token = np.array([rng.permutation(E)[:K] for _ in range(L)])
        add(h, token) if age % 3 else add_prompt(h, [token])
        used = np.zeros((L, E))
        np.put_along_axis(used, token, 1, 1)
        for scale, average in zip(SCALES, expected, strict=True):
            average += (used - average) / min(scale, age + YOUNG)
    np.testing.assert_array_equal(h.usual(), seen[-1][0])
    np.testing.assert_allclose(seen[-1], expected, atol=1e-6)


def test_one_text_asks_the_network_and_many_at_once_do_not():
    h = History(L, E, K / E, lambda averages: np.full((L, E), 0.7))
    for used, tokens, asked in ((K, 50, True), (int(CROWDED * K) + 1, 50, False), (K, 20, False), (K, 200, True)):
        for _ in range(tokens):
            for layer in range(L):
                h.add(layer, [*range(used)])
        assert (h.usual() == 0.7).all() == asked


def random_tokens(count, used, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.permutation(E)[:used] for _ in range(L)] for _ in range(count)]


@pytest.mark.parametrize("used", [2, 10, 14, 16])
def test_what_many_texts_at_once_share_by_chance_says_nothing(used):
    h, rng = History(12, 16, 2 / 16), np.random.default_rng(0)
    for _ in range(100):
        for layer in range(12):
            h.add(layer, rng.permutation(16)[:used].tolist())
    assert all(np.abs(chance - h.usual()).max() < 0.05 for chance in h.chances())


def test_after_many_texts_one_is_not_taken_for_all_of_them():
    h = History(L, E, K / E)
    for token in random_tokens(60, 6):
        add(h, token)
    for token in tokens_of([1, 2, 3, 4] * 3):
        add(h, token)
    np.testing.assert_array_equal(top(h.chances().first), np.sort(tokens_of([1])[0]))
    for token in random_tokens(3, K, seed=1):
        add(h, token)
    assert np.abs(h.chances().first - h.usual()).max() < 0.05


def test_a_text_whose_experts_are_all_the_same_is_certain():
    h = History(L, K, 1.0)
    for _ in range(9):
        for layer in range(L):
            h.add(layer, [*range(K)])
    assert all(np.isfinite(chance).all() and chance.min() > 0.99 for chance in h.chances())


@pytest.mark.parametrize("prompt", [3, 9])
def test_what_was_interrupted_in_its_first_layer_is_forgotten_too(prompt):
    """Between `_begin` and `_end`, as an interrupt may leave it."""
    for tokens in (1, 5, 30):
        h = told([0, 1, 2, 0, 1])
        h._begin(0, tokens)
        add_prompt(h, tokens_of([2, 0, 1, 2, 0, 1, 2, 0, 1][-prompt:]))
        np.testing.assert_array_equal(top(h.chances().first), np.sort(tokens_of([2])[0]))
        h._begin(0, tokens)
        add(h, tokens_of([2])[0])
        np.testing.assert_array_equal(top(h.chances().first), np.sort(tokens_of([0])[0]))


def test_of_a_very_long_prompt_the_end_counts():
    h, short = History(L, E, K / E), History(L, E, K / E)
    tokens = tokens_of(np.random.default_rng(3).integers(0, 40, 3000))
    add_prompt(h, tokens)
    for token in tokens:
        add(short, token)
    np.testing.assert_allclose(h._averages, short._averages, atol=1e-4)
    np.testing.assert_array_equal(h._ages, short._ages)

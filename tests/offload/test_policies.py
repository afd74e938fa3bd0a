"""Eviction policies from a table."""

import pytest

from moe_jax.offload.policies import LRU

A, B, C, D = (0, 0), (0, 1), (1, 0), (1, 1)


@pytest.mark.parametrize(
    ("policy", "uses", "candidates", "expected"),
    [
        (LRU(), [A, B, C], {A, B, C}, A),
        (LRU(), [A, B, C, A], {A, B, C}, B),  # used again
        (LRU(), [A, B, C], {B, C}, B),  # the oldest is no candidate
        (LRU(), [A, B, C, D], {D}, D),
        (LRU(), [A, B, A, B, B, C, A], {A, B, C}, B),  # how often does not matter
        (LRU(), [B, C], {A, B, C}, A),  # never used
    ],
)
def test_victim(policy, uses, candidates, expected):
    state = policy.init()
    for key in uses:
        state = policy.on_use(state, key)
    assert policy.victim(state, dict.fromkeys(candidates)) == expected


def test_two_states_are_independent():
    policy = LRU()
    first, second = policy.init(), policy.init()
    first = policy.on_use(policy.on_use(first, A), B)
    second = policy.on_use(policy.on_use(second, B), A)
    assert (policy.victim(first, {A, B}), policy.victim(second, {A, B})) == (A, B)

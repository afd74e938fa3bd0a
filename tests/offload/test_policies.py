"""Eviction policies from tables, and Belady's against every possible choice."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import moe_jax
from moe_jax.checkpoint.families import mixtral
from moe_jax.errors import UserError
from moe_jax.offload.policies import LFU, LRU, Belady, LeastStale, Predicted
from moe_jax.trace import Trace
from tests.tiny import SIZES, TINY, write_tiny

ROOT = Path(__file__).parents[2]
A, B, C, D = (0, 0), (0, 1), (1, 0), (1, 1)
KEYS = [A, B, C, D]


def expected(keys):
    """A is expected first, D last."""
    return np.array([float(KEYS.index(key)) for key in keys])


@pytest.mark.parametrize(
    ("policy", "uses", "candidates", "victim"),
    [
        (LRU(), [A, B, C], {A, B, C}, A),
        (LRU(), [A, B, C, A], {A, B, C}, B),  # used again
        (LRU(), [A, B, C], {B, C}, B),  # the oldest is no candidate
        (LRU(), [A, B, C, D], {D}, D),
        (LRU(), [A, B, A, B, B, C, A], {A, B, C}, B),  # how often does not matter
        (LRU(), [B, C], {A, B, C}, A),  # never used
        (LFU(), [A, A, B, C, C], {A, B, C}, B),
        (LFU(), [A, A, B, C, C], {A, C}, A),  # the older of equals
        (LFU(), [A, B, B], {A, B, C}, C),  # never used
        (LFU(), [A] * 5 + [B] * 4 * LFU.HALF_LIFE, {A, B}, A),
        (LFU(), [A] * LFU.HALF_LIFE + [B] * (LFU.HALF_LIFE - 1), {A, B}, A),  # half of the uses are forgotten
        (LeastStale(), [A, B, C, D], {A, B, C, D}, C),  # nothing is stale: the layer that ran last is farthest ahead
        (LeastStale(), [A, B, C, D, A], {A, B, C, D}, B),  # layer 0 has run again without B
        (LeastStale(), [B, C, D, A, C], {A, B, C, D}, B),  # of two that are stale, the older
        (LeastStale(), [A, B, C, D, A, C], {A, C}, C),
        (Predicted(), [D, D], {A, B, C}, C),  # uses do not matter
        (Predicted(), [], {B, A}, B),
        (Belady([A, B, C, A, B]), [A, B, C], {A, B, C}, C),  # never again
        (Belady([A, B, C, A, B]), [A, B, C], {A, B}, B),
        (Belady([A, B, A, C, B]), [A, B, A], {A, B}, A),
        (Belady([A, B]), [D, A], {B, D}, D),  # a use that the record lacks
    ],
)
def test_victim(policy, uses, candidates, victim):
    state = policy.init()
    for key in uses:
        state = policy.on_use(state, key)
    assert policy.victim(state, dict.fromkeys(candidates), expected) == victim


@pytest.mark.parametrize(
    ("policy", "victim"),
    [
        (LRU(), B),  # as recent as a use
        (LFU(), A),  # no use yet
        (LeastStale(), C),  # layer 0's turn has not begun: nothing of it is stale
        (Belady([A, B, C, B, A, C]), A),  # does not move the record on
    ],
)
def test_a_speculative_load_is_no_use_of_its_layer(policy, victim):
    state = policy.init()
    for key in (A, B, C):
        state = policy.on_use(state, key)
    state = policy.on_use(state, A, needed=False)
    candidates = {LFU: {A, B}, LRU: {A, B}, LeastStale: {A, B, C}, Belady: {A, B}}[type(policy)]
    for key in [B] if isinstance(policy, LFU) else []:
        state = policy.on_use(state, key)
    assert policy.victim(state, dict.fromkeys(candidates), expected) == victim


@pytest.mark.parametrize("policy", [LRU(), LFU(), LeastStale()])
def test_two_states_are_independent(policy):
    first, second = policy.init(), policy.init()
    first = policy.on_use(policy.on_use(first, A), B)
    second = policy.on_use(policy.on_use(second, B), A)
    assert (policy.victim(first, {A, B}, expected), policy.victim(second, {A, B}, expected)) == (A, B)


def loads(policy, uses, capacity):
    """Misses of a cache that serves one use after another."""
    state, held, missed = policy.init(), set(), 0
    for key in uses:
        state = policy.on_use(state, key)
        if key not in held:
            missed += 1
            if len(held) == capacity:
                held.remove(policy.victim(state, held, expected))
            held.add(key)
    return missed


@given(st.lists(st.sampled_from(KEYS), max_size=14), st.integers(1, 3))
def test_belady_loads_as_few_as_any_choice_of_victims(uses, capacity):
    @functools.cache
    def least(at: int, held: frozenset) -> int:
        if at == len(uses):
            return 0
        if uses[at] in held:
            return least(at + 1, held)
        kept = [held] if len(held) < capacity else [held - {victim} for victim in held]
        return 1 + min(least(at + 1, rest | {uses[at]}) for rest in kept)

    assert loads(Belady(uses), uses, capacity) == least(0, frozenset())
    assert all(loads(policy, uses, capacity) >= least(0, frozenset()) for policy in (LRU(), LFU()))


def test_belady_replays_the_run_of_its_trace_and_no_other(tmp_path):
    write_tiny(tmp_path / "model", dataclasses.replace(TINY, eos_ids=()))
    write_tiny(tmp_path / "fewer_layers", mixtral.architecture(**SIZES | {"num_layers": 4}))

    def run(prompt, tokens, checkpoint="model", **offload):
        offload = {"policy": "belady", "trace": str(tmp_path / "trace.jsonl"), **offload}
        model = moe_jax.load(str(tmp_path / checkpoint), offload=offload, prefetch={"predictor": "none"})
        try:
            return "".join(model.generate(prompt, tokens))
        finally:
            model.close()

    recorded = f"--config.checkpoint={tmp_path}/model --prompt=abc --max_new_tokens=8 --trace={tmp_path}/trace.jsonl"
    subprocess.run([sys.executable, "infer.py", *recorded.split()], cwd=ROOT, check=True, capture_output=True)
    text = run("abc", 8)
    assert run("abc", 9, device_budget="50%").startswith(text)  # what follows the record is no departure
    with pytest.raises(UserError, match=r"not that of --config.offload.trace .* --trace=FILE"):
        run("abd", 8)
    with pytest.raises(UserError, match=r"another model than one of 4 layers, 7 experts and 2 active"):
        run("abc", 8, "fewer_layers")


@pytest.mark.parametrize(("experts", "top_k"), [(3, 2), (4, 3)])
def test_a_trace_of_other_experts_is_of_another_model(experts, top_k):
    trace = Trace()
    trace.step(0, [3, 1], ["missed", "missed"])
    trace.step(1, [0, 1, 2], ["missed", "missed", "missed"])
    Belady.of(trace.steps(), 2, 4, 2)
    with pytest.raises(UserError, match="another model"):
        Belady.of(trace.steps(), 2, experts, top_k)

"""Numbers of a run: whose they are, and what is in them."""

import dataclasses
from contextlib import closing
from typing import Any

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.inference import bounds
from moe_jax.inference.rows import Lists, Rows
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.state import Batch, Record
from tests.tiny import TINY, write_tiny


def test_with_nothing_in_the_store_the_bounds_are_null(monkeypatch):
    """As when Ctrl-C comes while all that the budget holds is on its way."""
    model = moe_jax.load(prefetch={"predictor": "none"})
    generation = model.start(["def main("], 3)
    for _ in generation:
        pass
    assert model.metrics(generation)["bound_overlap_s"] > 0
    monkeypatch.setattr(model.engine.source, "resident", list)
    assert model.metrics(generation)["bound_overlap_s"] is None
    model.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint = str(write_tiny(tmp_path_factory.mktemp("tiny"), dataclasses.replace(TINY, eos_ids=())))
    options = {"offload": {"device_budget": "25%"}, "prefetch": {"predictor": "router"}}
    with closing(moe_jax.load(checkpoint, **options, max_seq_len=64, batch_size=2)) as model:
        source: Any = model.engine.source
        source.wants_prediction = lambda cost_s: True  # whether it pays is a matter of the machine
        yield model


def run(model, prompts, tokens):
    generation = model.start(prompts, tokens)
    for _ in generation:
        pass
    return generation, model.metrics(generation)


def test_a_last_batch_that_is_smaller_than_the_first(model):
    generation, found = run(model, ["one two", "three", "four five six"], 4)
    assert [len(row) for row in generation.record.active] == [8, 8, 8, 1, 1, 1]
    assert 0 < found["bound_overlap_s"] <= found["bound_serial_s"] and found["recall"] is not None


def test_each_batch_comes_after_its_own_prompts():
    record = Record([Batch(0, 64), Batch(2, 64)], [[0, 1], [3]], Lists([[0], [2], [1]]))
    record.active = Rows([np.ones(1, bool)] * 3)
    uses = [(0, -1), (1, -1), (0, 0), (2, 1), (3, -1), (1, 2)]
    assert bounds.uses_in_order(record, 1) == [((0, expert), step) for expert, step in uses]
    record.prefill_needed.append([2])  # a prompt that was interrupted
    record.batches.append(Batch(3, 64))
    assert bounds.uses_in_order(record, 1)[-1] == ((0, 2), -1)


def test_a_generation_counts_what_it_did_itself(model):
    first, before = run(model, ["one two three"], 9)
    second, found = run(model, ["four"], 5)
    assert first.trace.summary()["tokens"] == 8 and second.trace.summary()["tokens"] == 4
    assert model.metrics(first)["needed"] == before["needed"] and model.metrics(first)["hit_rate"] == before["hit_rate"]
    assert found["compile_s"] == second.compile_s and before["compile_s"] == first.compile_s


def test_a_generation_that_is_given_up_takes_nothing_from_another(model):
    _, alone = run(model, ["four five"], 6)
    left = iter(model.start(["one two three"], 6))
    next(left)
    other = model.start(["four five"], 6)
    pieces = iter(other)
    next(pieces)
    next(left)
    left.close()
    for _ in pieces:
        pass
    assert len(other.record.active) == 5 and other.trace.summary()["tokens"] == 5
    assert model.metrics(other)["recall"] == alone["recall"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 3, 0.9, seed=5)])
def test_time_to_first_token_has_no_compilation(model, sampling, caplog):
    generation = model.start(["one two three"], 3, sampling)
    with jax.log_compiles():
        for _ in generation:
            pass
    assert not [record for record in caplog.records if "compil" in record.message.lower()]


def test_another_seed_and_temperature_are_no_other_executable(model, caplog):
    run_all = lambda sampling: [*model.start(["one"], 2, sampling)]
    run_all(Sampling(0.7, 3, 0.9, seed=5))
    with jax.log_compiles():
        run_all(Sampling(0.8, 3, 0.8, seed=6))
    assert not [record for record in caplog.records if "Compiling" in record.message]


def test_what_nobody_predicted_took_no_time(tmp_path):
    with closing(moe_jax.load(str(write_tiny(tmp_path, TINY)), offload={"tier": "none"}, max_seq_len=64)) as model:
        assert run(model, ["one"], 4)[1]["predictor_s_per_token"] is None

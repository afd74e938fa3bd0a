"""The oracle replays what an earlier run routed, and says so when a run leaves that path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.errors import UserError
from moe_jax.prediction.interface import Features
from moe_jax.prediction.oracle import Oracle, recorded
from tests.prediction.synthetic import SPEC
from tests.tiny import TINY, write_tiny

STEPS, BATCH = 4, 2
L, E, K, H = SPEC.num_layers, SPEC.num_experts, SPEC.top_k, SPEC.horizon


def routing(seed: int = 0) -> list[np.ndarray]:
    """One [B, K] per step and layer, as the engine records it."""
    rng = np.random.default_rng(seed)
    return [np.stack([rng.permutation(E)[:K] for _ in range(BATCH)]).astype(np.int32) for _ in range(STEPS * L)]


def test_it_names_the_experts_of_the_layers_ahead_across_the_wrap():
    path = routing()
    oracle, params = Oracle(), Oracle.replay(SPEC, recorded([*path, path[0]], L))  # the last one is of an unended step
    state = oracle.prime(SPEC, np.zeros((L, BATCH, 3, K), np.int32))
    apply, begin = jax.jit(oracle.apply), jax.jit(oracle.begin)

    def check(prediction, start):
        for h in range(H):
            for row in range(BATCH):
                hot = np.zeros(E)
                if start + h < len(path):
                    hot[path[start + h][row]] = 1
                np.testing.assert_array_equal(prediction.probability[row, h], hot)

    for i, ids in enumerate(path):
        if i % L == 0:
            prediction, state = begin(params, state, jnp.zeros((BATCH, SPEC.d_model)), np.zeros(BATCH, np.int32))
            check(prediction, i)
        zeros = np.zeros((BATCH, SPEC.d_model), np.float32), np.zeros((BATCH, E), np.float32)
        prediction, state = apply(params, state, Features(np.int32(i % L), *zeros, ids, np.ones((BATCH, K))))
        check(prediction, i + 1)


def test_a_row_that_leaves_the_path_is_nan():
    path = routing()
    oracle, params = Oracle(), Oracle.replay(SPEC, recorded(path, L))
    other = path[0].copy()
    other[1] = (other[1] + 1) % E
    zeros = np.zeros((BATCH, SPEC.d_model), np.float32), np.zeros((BATCH, E), np.float32)
    features = Features(np.int32(0), *zeros, other, np.ones((BATCH, K)))
    prediction, _ = oracle.apply(params, oracle.init_state(SPEC, BATCH), features)
    assert np.isfinite(prediction.probability[0]).all() and np.isnan(prediction.probability[1]).all()


def test_it_finds_its_place_after_steps_without_predictions():
    path = routing()
    oracle, params = Oracle(), Oracle.replay(SPEC, recorded(path, L))
    state = oracle.prime(SPEC, np.stack(path[:L])[:, :, None], step=2)
    prediction, _ = oracle.begin(params, state, jnp.zeros((BATCH, 4)), np.zeros(BATCH, np.int32))
    ranked = jax.lax.top_k(prediction.probability[:, 0], K)[1]
    np.testing.assert_array_equal(np.sort(ranked), np.sort(path[2 * L]))


def test_a_run_without_decode_steps_cannot_be_replayed():
    with pytest.raises(UserError, match="at least two tokens"):
        recorded([np.zeros((1, K))] * (L - 1), L)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"), dataclasses.replace(TINY, eos_ids=()))


def generate(checkpoint, predictor, prompts=("abc", "another prompt"), **options):
    """Outputs and metrics of a run."""
    prefetch = {"predictor": predictor, "horizon": 4}
    model = moe_jax.load(checkpoint=str(checkpoint), prefetch=prefetch, offload={"device_budget": "30%"}, **options)
    generation = model.start(prompts, 12)
    for _ in generation:
        pass
    found = model.metrics(generation)
    model.close()
    return [output.token_ids for output in generation.outputs], found


def test_through_the_engine_it_predicts_everything_and_changes_nothing(checkpoint):
    plain, _ = generate(checkpoint, "none")
    tokens, found = generate(checkpoint, "oracle")
    assert tokens == plain
    assert found["recall"] == 1.0
    # One prompt after another through one model: each is recorded anew.
    with pytest.raises(UserError, match="replays one batch: set --config.batch_size=2"):
        generate(checkpoint, "oracle", batch_size=1)


def test_the_engine_refuses_a_run_that_was_not_recorded(checkpoint):
    model = moe_jax.load(checkpoint=str(checkpoint), prefetch={"predictor": "oracle", "horizon": 4})
    model.start(["abc"], 6)
    other = model.tokenizer.encode("xyz")
    _, state = model.engine.prefill([other], 6)
    with pytest.raises(UserError, match="the run is not the one it was made for"):
        model.engine.decode(np.array([70], np.int32), state)
    model.close()

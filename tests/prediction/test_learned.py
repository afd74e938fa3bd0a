"""The learned predictor: whole windows against token by token, its start, and its files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.prediction import predictors, saved
from moe_jax.prediction.best import BestPerLayer
from moe_jax.prediction.interface import Features, at
from moe_jax.prediction.learned import Learned, boundary, score_windows, window_inputs, window_targets
from tests.full_disk import files_of_at_most
from tests.prediction.synthetic import MODEL, SPEC, activations, logged, parts
from tests.prediction.test_predictors import run


def weights(params):
    vectors = np.ones((SPEC.num_layers, SPEC.num_experts, SPEC.d_model))
    return {"network": params["network"], "vectors": vectors, "best": np.ones((SPEC.num_layers + 1, SPEC.horizon))}


def noisy(learned):
    """Parameters in which every table matters."""
    params = learned.init(jax.random.key(0), SPEC, parts())
    rng, tables = np.random.default_rng(0), params["network"]
    noise = lambda table: jnp.asarray(table + 0.3 * rng.standard_normal(table.shape, np.float32))
    row = rng.integers(0, len(tables["tokens"]), 40)  # tokens from 40 on were never seen
    params["network"] = {name: noise(table) for name, table in tables.items()} | {"row": row.astype(np.int32)}
    return params


def run_with_beginnings(learned, arrays, params):
    """Probabilities of `begin` and `apply` token by token, [W, T, L + 1, H, E]."""
    a, out = logged(arrays), []
    state = learned.init_state(SPEC, len(a.lengths))
    begin, apply = jax.jit(learned.begin), jax.jit(learned.apply)
    for t in range(a.ids.shape[2]):
        prediction, state = begin(params, state, a.embedding[:, t], a.tokens[:, t])
        out.append(np.asarray(prediction.probability))
        for layer in range(SPEC.num_layers):
            here = [x[:, layer, t] for x in a[1:5]]
            prediction, state = apply(params, state, Features(np.int32(layer), *here))
            out.append(np.asarray(prediction.probability))
    return np.stack(out, axis=1).reshape(len(a.lengths), -1, SPEC.num_layers + 1, *out[0].shape[1:])


def test_whole_windows_equal_token_by_token():
    learned, arrays = Learned(3, 9), activations(SPEC, parts(), 2, 6)
    params = noisy(learned)
    stepwise = run_with_beginnings(learned, arrays, params)  # [W, T, L + 1, H, E]

    @jax.jit
    def score(network, a):
        return score_windows(network, window_inputs(1e-5, a, network["row"]), SPEC.top_k)[1]

    scores = score(params["network"], logged(arrays))
    whole = np.array(jax.nn.sigmoid(scores)).reshape(SPEC.num_layers + 1, 2, 6, SPEC.horizon, -1)
    np.testing.assert_allclose(whole.transpose(1, 2, 0, 3, 4), stepwise, atol=1e-5)


@pytest.mark.parametrize("predictor", [Learned(), BestPerLayer()], ids=lambda p: p.name)
def test_the_tables_of_one_layer_say_what_those_of_all_say(predictor):
    a, trained = logged(activations(SPEC, parts(), 2, 1)), weights(noisy(Learned(3, 9)))
    trained["best"] = np.random.default_rng(0).integers(0, 4, (SPEC.num_layers + 1, SPEC.horizon))
    params = predictors.params_of(predictor.name, SPEC, parts(), trained)
    state = predictor.prime(SPEC, np.random.default_rng(1).integers(0, 6, (SPEC.num_layers, 2, 3, SPEC.top_k)))
    apply = jax.jit(predictor.apply)
    for layer in range(SPEC.num_layers):
        features = Features(np.int32(layer), *[x[:, layer, 0] for x in a[1:5]])
        whole, own = (apply(p, state, features) for p in (params, at(predictor, params, layer)))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), whole, own)


def test_window_targets_against_a_loop():
    rng = np.random.default_rng(0)
    W, L, T, E, H = 3, 3, 5, 4, 3
    values, lengths = rng.normal(size=(W, L, T, E)), np.array([5, 3, 1])  # place 0 is before layer 0
    wanted, known = (np.array(x) for x in jax.jit(window_targets, static_argnums=2)(values, lengths, H))
    for place, w, t, h in np.ndindex(L + 1, W, T, H):
        carry, target = divmod(place + h, L)
        inside = t + carry < lengths[w]
        assert known[place, w * T + t, h] == inside
        if inside:
            np.testing.assert_allclose(wanted[place, w * T + t, h], values[w, target, t + carry], rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 6])
def test_boundary_parts_the_top_k_from_the_rest(top_k):
    logits = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    above = (logits > np.array(boundary(jnp.asarray(logits), top_k))).sum(-1)
    assert (above == top_k).all() if top_k < 6 else (above >= 5).all()
    assert np.isfinite(boundary(jnp.zeros((2, 6)), top_k)).all()


@pytest.fixture
def trained(tmp_path):
    params = noisy(Learned(3, 9))
    saved.save(tmp_path, weights(params), SPEC, MODEL, {"note": 1})
    return tmp_path, params


def test_a_full_disk_is_one_line_and_leaves_no_predictor(trained):
    directory, params = trained
    with files_of_at_most(100), pytest.raises(UserError, match=rf"^{directory} cannot be written \(File too large\)"):
        saved.save(directory, weights(params), SPEC, MODEL, {})
    with pytest.raises(UserError, match="holds no trained predictor"):
        saved.load(directory, SPEC, MODEL)
    saved.save(directory, weights(params), SPEC, MODEL, {})
    saved.load(directory, SPEC, MODEL)


@pytest.mark.parametrize(("name", "value"), [("tokens", np.nan), ("read", np.inf), ("bias", 1e6)])
def test_weights_that_are_not_finite_are_not_saved_and_earlier_ones_stay(trained, name, value):
    directory, params = trained
    bad = weights(params)
    bad["network"] |= {name: bad["network"][name].at[0, 0].set(value)}
    with pytest.raises(UserError, match=f"weights network/{name}.* not finite, so it is not saved; lower"):
        saved.save(directory, bad, SPEC, MODEL, {})
    saved.load(directory, SPEC, MODEL)


def test_saved_weights_come_back_and_a_shorter_horizon_is_a_part_of_them(trained):
    directory, params = trained
    whole = saved.load(directory, SPEC, MODEL)
    written = weights(params)
    tables = whole["network"]["tokens"], np.asarray(written["network"]["tokens"])  # int8 with a step for each column
    assert (np.abs(tables[0] - tables[1]) <= 1.01 * np.abs(tables[1]).max(0) / 254 + 1e-6).all()
    assert np.abs(tables[1]).max() > 0.1
    written["network"] |= {"tokens": whole["network"]["tokens"]}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), whole, written)
    short_spec = dataclasses.replace(SPEC, horizon=2)
    short = saved.load(directory, short_spec, MODEL)
    learned, arrays = Learned(), activations(SPEC, parts(), 2, 3)
    expected = run(learned, arrays, params=predictors.params_of("learned", SPEC, parts(), whole))[0][:, :, :, :2]
    np.testing.assert_allclose(
        run(learned, arrays, short_spec, predictors.params_of("learned", short_spec, parts(), short))[0],
        expected,
        atol=1e-6,
    )


def test_it_refuses_another_model_and_a_longer_horizon(trained):
    directory, _ = trained
    with pytest.raises(UserError, match="trained for another model"):
        saved.load(directory, SPEC, "another model")
    deeper = dataclasses.replace(SPEC, num_layers=9, horizon=4)
    with pytest.raises(UserError, match="looks 3 layers ahead, not 4"):
        saved.load(directory, deeper, MODEL)


@pytest.mark.parametrize("damage", ["card", "fields", "weights"])
def test_damaged_files_are_one_line(trained, damage):
    directory, _ = trained
    card = directory / "predictor.json"
    if damage == "card":
        card.write_text("{")
    elif damage == "fields":
        card.write_text(json.dumps({"schema": 1}))
    else:
        for file in (directory / "weights").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    with pytest.raises(UserError, match="train it again") as error:
        saved.load(directory, SPEC, MODEL)
    assert "\n" not in str(error.value)

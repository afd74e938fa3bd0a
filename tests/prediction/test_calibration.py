"""Sharpness of the look-aheads: what is fitted is the best for the right targets, is kept, and changes no ranking."""

import json

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.prediction import calibration, metrics, predictors
from moe_jax.prediction.activation_log import ActivationLog, Activations
from moe_jax.prediction.interface import Features
from moe_jax.prediction.lookahead import default_sharpness
from tests.full_disk import files_of_at_most
from tests.prediction.synthetic import MODEL, SPEC, outputs, parts, top_k, windows

L, H, E, K = SPEC.num_layers, SPEC.horizon, SPEC.num_experts, SPEC.top_k
JITTED = {name: (jax.jit(p.begin), jax.jit(p.apply)) for name, p in calibration.LOOKAHEADS.items()}
LENGTHS = np.array([60, 60, 41, 60, 9, 60, 60, 60, 60, 60, 60, 33])  # more windows than are read together


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> ActivationLog:
    """Every layer adds noise to the residual: looking ahead is worth less with the distance."""
    rng, T = np.random.default_rng(0), 60
    token = rng.normal(size=(len(LENGTHS), 1, T, SPEC.d_model))
    noise = np.array([0.0, 0.4, 0.9])[:, None, None] * rng.normal(size=(len(LENGTHS), L, T, SPEC.d_model))
    x = (token + noise.cumsum(1)).astype(np.float32)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + SPEC.norm_eps) * parts().expert_norms[:, None]
    logits = np.einsum("nltd,led->nlte", normed, parts().routers).astype(np.float32)
    gates = np.full((len(LENGTHS), L, T, K), 0.5, np.float32)
    log = ActivationLog(tmp_path_factory.mktemp("log"), SPEC, MODEL, windows(len(LENGTHS), T, LENGTHS))
    embedding = x[:, 0] + 0.3 * rng.normal(size=x[:, 0].shape).astype(np.float32)
    log.write(0, Activations(embedding, x, logits, top_k(logits, K), gates, LENGTHS), outputs(SPEC, 0))
    return log


def params_of(name, sharpness=None):
    vectors = 0.3 * np.random.default_rng(1).normal(size=(L, E, SPEC.d_model))
    return predictors.params_of(name, SPEC, parts(), {"vectors": vectors, "sharpness": {name: sharpness}})


def losses(name, log, sharpness):
    """Cross-entropy [L + 1, H] by the predictor as it is used, over the tokens that the fit looks at."""
    a, (begin, apply) = log.read(range(len(LENGTHS))), JITTED[name]
    params, total = params_of(name, sharpness), np.zeros((L + 1, H))
    for t in range(1, a.ids.shape[2], calibration.STRIDE):
        told = [begin(params, (), a.embedding[:, t], a.tokens[:, t])[0]]
        for layer in range(L):
            residual, logits, gates = (np.asarray(x[:, layer, t], np.float32) for x in (a.residual, a.logits, a.gates))
            features = Features(np.int32(layer), residual, logits, a.ids[:, layer, t].astype(np.int32), gates)
            told.append(apply(params, (), features)[0])
        for place, prediction in enumerate(told):
            for h in range(1, H + 1):
                carry, target = divmod(place - 1 + h, L)
                rows = t + carry < LENGTHS
                ids = a.ids[rows, target, min(t + carry, 59)]
                true = (ids[:, :, None] == np.arange(E)).any(1)
                p = np.clip(np.asarray(prediction.probability)[rows, h - 1], 1e-6, 1 - 1e-6)
                total[place, h - 1] -= np.log(np.where(true, p, 1 - p)).sum()
    return total


@pytest.mark.parametrize("name", calibration.LOOKAHEADS)
def test_no_other_sharpness_is_better(log, name):
    best = calibration.fit(name, params_of(name), SPEC, log, np.arange(len(LENGTHS)))
    assert best.shape == (L + 1, H) and best.dtype == np.float32
    assert best[1, 0] > 2 * best[1, 1] > 4 * best[1, 2] > 0  # the next layer, the one after, the next token
    least = losses(name, log, best)
    for factor in (0.6, 1.6):
        # Where nothing can be told, any small value is as good.
        assert (losses(name, log, factor * best) > least - 0.05)[best > 0.1].all()
        assert (losses(name, log, factor * best) > least + 0.1)[best > 1].all()


def test_probabilities_become_calibrated_and_the_ranking_stays(log):
    best = calibration.fit("router", params_of("router"), SPEC, log, np.arange(len(LENGTHS)))
    scores = [
        metrics.evaluate(predictors.Router(), params_of("router", sharpness), SPEC, log)
        for sharpness in (best, np.full_like(best, 30))
    ]
    np.testing.assert_array_equal(scores[0].recall, scores[1].recall)
    assert scores[0].calibration_error.max() < 0.05 < scores[1].calibration_error.max()
    assert (scores[0].brier <= scores[1].brier).all()


def test_what_has_no_target_keeps_the_default(log):
    best = calibration.fit("router", params_of("router"), SPEC, log, np.array([4]))  # nine tokens: only its second
    known = calibration.fit("router", params_of("router"), SPEC, log, np.arange(len(LENGTHS)))
    assert best.shape == known.shape and np.isfinite(best).all()
    short = ActivationLog(log.directory.parent / "short", SPEC, MODEL, windows(1, 60, np.array([2])))
    short.write(0, log.read([0]), outputs(SPEC, 0))
    default, found = default_sharpness(SPEC), calibration.fit("router", params_of("router"), SPEC, short, np.arange(1))
    np.testing.assert_array_equal(found[-1], default[-1])  # all in the token after the window's last
    assert (found[1, :2] != default[1, :2]).all()


def test_a_full_disk_is_one_line_and_keeps_what_was_stored(tmp_path):
    value = np.ones((SPEC.num_layers + 1, SPEC.horizon), np.float32)
    calibration.store(tmp_path, MODEL, {"router": value}, ["a.txt"])
    with files_of_at_most(20), pytest.raises(UserError, match=r"calibration.json cannot be written \(File too large"):
        calibration.store(tmp_path, MODEL, {"router": 2 * value}, ["a.txt"])
    np.testing.assert_array_equal(calibration.stored(tmp_path, SPEC, MODEL)["router"], value)


def test_it_is_kept_beside_a_predictor_and_cut_to_the_horizon(tmp_path):
    value = np.arange((L + 1) * H, dtype=np.float32).reshape(L + 1, H)
    assert calibration.stored(tmp_path, SPEC, MODEL) == calibration.stored("", SPEC, MODEL) == {}
    calibration.store(tmp_path, MODEL, {"router": value}, ["a.txt"])
    shorter = calibration.stored(tmp_path, SPEC.__class__(**{**SPEC.__dict__, "horizon": 2}), MODEL)
    np.testing.assert_array_equal(shorter["router"], value[:, :2])
    np.testing.assert_array_equal(params_of("router", value)["sharpness"], value)
    np.testing.assert_array_equal(params_of("router")["sharpness"], default_sharpness(SPEC))
    with pytest.raises(UserError, match="is of another model"):
        calibration.stored(tmp_path, SPEC, "another model")
    for damaged in ("[", "{}", json.dumps({"model": MODEL, "sharpness": {"router": [[1.0, 2.0]]}})):
        (tmp_path / calibration.FILE).write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            calibration.stored(tmp_path, SPEC, MODEL)


def test_the_shipped_predictor_is_calibrated_for_the_shipped_model():
    from moe_jax.checkpoint.converted import open_checkpoint
    from moe_jax.inference.session import shipped

    checkpoint = open_checkpoint(shipped("model"))
    for name in calibration.LOOKAHEADS:
        found = predictors.load(name, 8, shipped("predictor"), checkpoint.architecture, checkpoint.dense())
        assert found is not None and found[1].horizon == 8
        assert not np.allclose(found[2]["sharpness"], default_sharpness(found[1]))
        far = predictors.load(name, 4, shipped("predictor"), checkpoint.architecture, checkpoint.dense())
        jax.tree.map(np.testing.assert_array_equal, far[2]["sharpness"], found[2]["sharpness"][:, :4])  # type: ignore

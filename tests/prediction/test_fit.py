"""Fitting: it learns what the routers alone do not say, is repeatable, and resumes to the same bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.prediction import closed_form, fit, metrics, predictors
from tests.prediction.synthetic import SPEC, parts, written_log

CONFIG = fit.FitConfig(
    hidden=4,
    steps=12,
    batch_windows=4,
    learning_rate=1e-2,
    direct_rate=0.3,
    ridge=1e-5,
    seed=0,
    evaluate_every=4,
    checkpoint_every=3,
    patience=100,
)
VALIDATION = np.arange(40) % 8 == 0


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return written_log(tmp_path_factory.mktemp("log"), count=40, length=16)


def train(log, directory, config=CONFIG, **kwargs):
    return fit.fit(config, SPEC, parts(), log, VALIDATION, directory, **kwargs)


@pytest.fixture(scope="module")
def whole(log, tmp_path_factory):
    return train(log, tmp_path_factory.mktemp("whole"))


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(equal))


def test_it_learns_what_the_routers_do_not_say(log, whole):
    held_out = np.flatnonzero(VALIDATION)
    learned = metrics.evaluate(predictors.Learned(), whole[0], SPEC, log, held_out, batch=8)
    router = predictors.Router()
    look = metrics.evaluate(router, router.init(jax.random.key(0), SPEC, parts()), SPEC, log, held_out, batch=8)
    # Every layer turns the residual, which regression undoes: the look-ahead knows nothing of it.
    assert (learned.by_horizon("recall", False)[0] or 0) > (look.by_horizon("recall", False)[0] or 0) + 0.25
    assert learned.brier.mean() < look.brier.mean()
    # The closed form and the scores of the fit speak of the same thing.
    assert whole[1]["recall"] == pytest.approx(learned.recall.mean(), abs=0.05)


def test_the_closed_form_alone_is_calibrated(log, tmp_path):
    params, best = train(log, tmp_path, dataclasses.replace(CONFIG, steps=0))
    scores = metrics.evaluate(predictors.Learned(), params, SPEC, log, batch=8)
    assert best["step"] == 0
    assert scores.calibration_error.mean() < 0.1


def test_one_seed_gives_the_same_bits_and_another_does_not(log, whole, tmp_path):
    assert same(train(log, tmp_path / "again")[0], whole[0])
    other = train(log, tmp_path / "other", dataclasses.replace(CONFIG, seed=1))
    assert not same(other[0], whole[0])


@pytest.mark.parametrize("killed_at", [1, 11])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(log, whole, tmp_path, killed_at):
    class Killed(Exception):
        pass

    def progress(step, values):
        if step == killed_at:
            raise Killed

    with pytest.raises(Killed):
        train(log, tmp_path, progress=progress)
    seen = []
    resumed = train(log, tmp_path, progress=lambda step, values: seen.append(step))
    assert seen[0] > (killed_at - 1) // CONFIG.checkpoint_every * CONFIG.checkpoint_every  # it did not start again
    assert same(resumed[0], whole[0]) and resumed[1] == whole[1]


def test_the_best_look_is_kept_and_patience_ends_a_hopeless_run(log, tmp_path):
    looks = {}

    def progress(step, values):
        if "validation_recall" in values:
            looks[step] = values["validation_recall"]

    wild = dataclasses.replace(CONFIG, learning_rate=3.0, steps=40, patience=2)  # ruins what the closed form found
    _, best = train(log, tmp_path, wild, progress=progress)
    assert best["recall"] == pytest.approx(max(looks.values())) and looks[max(looks)] < best["recall"]
    assert max(looks) < 40


def test_another_configuration_is_refused(log, tmp_path):
    train(log, tmp_path, dataclasses.replace(CONFIG, steps=0))
    with pytest.raises(UserError, match="of other settings, model or text"):
        train(log, tmp_path)


def test_whitening_does_not_change_the_network():
    rng = np.random.default_rng(0)
    learned = predictors.Learned(hidden=3)
    network = learned.init(jax.random.key(0), SPEC, parts())["network"]
    L, D = SPEC.num_layers, SPEC.d_model
    basis = {"white": rng.normal(size=(L, D, D)).astype(np.float32), "mean": rng.normal(size=(L, D)).astype(np.float32)}
    x = rng.normal(size=(L, 5, D)).astype(np.float32)
    rest = jnp.zeros((L, 5, SPEC.num_experts)), jnp.zeros((L, 5, SPEC.horizon, SPEC.num_experts))
    white = np.einsum("lrd,lde->lre", x - basis["mean"][:, None], basis["white"])
    score = jax.jit(lambda network, x: learned.score_windows(network, (x, *rest), SPEC.top_k))
    in_basis = score(network, white)
    folded = score(closed_form.unwhiten(network, basis), x)
    np.testing.assert_allclose(in_basis, folded, rtol=1e-3, atol=1e-3)

"""Fitting: it learns what the routers alone do not say, is repeatable, and resumes to the same bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.prediction import closed_form, fit, metrics, predictors
from moe_jax.prediction.learned import Inputs, window_inputs
from tests.prediction.synthetic import SPEC, parts, written_log
from tests.prediction.test_learned import noisy

CONFIG = fit.FitConfig(
    hidden=4,
    expert_hidden=2,
    loss="squared+membership",
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


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """To train on, and of other text to choose with."""
    train = written_log(tmp_path_factory.mktemp("log"), count=40, length=16)
    return train, written_log(tmp_path_factory.mktemp("validation"), count=6, length=16, seed=3)


def train(logs, directory, config=CONFIG, **kwargs):
    return fit.fit(config, SPEC, parts(), logs[0], logs[1], directory, **kwargs)


@pytest.fixture(scope="module")
def whole(logs, tmp_path_factory):
    return train(logs, tmp_path_factory.mktemp("whole"))


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(equal))


def test_it_learns_what_the_routers_do_not_say(logs, whole):
    learned = metrics.evaluate(predictors.Learned(), whole[0], SPEC, logs[1], batch=6)
    router = predictors.Router()
    look = metrics.evaluate(router, router.init(jax.random.key(0), SPEC, parts()), SPEC, logs[1], batch=6)
    # Every layer turns the residual, which regression undoes: the look-ahead knows nothing of it.
    assert (learned.by_horizon("recall", False)[0] or 0) > (look.by_horizon("recall", False)[0] or 0) + 0.25
    assert learned.brier.mean() < look.brier.mean()
    # The closed form and the scores of the fit speak of the same thing.
    assert whole[1]["recall"] == pytest.approx(learned.recall.mean(), abs=0.05)


def test_the_closed_form_alone_is_calibrated(logs, tmp_path):
    params, best = train(logs, tmp_path, dataclasses.replace(CONFIG, steps=0))
    scores = metrics.evaluate(predictors.Learned(), params, SPEC, logs[1], batch=6)
    assert best["step"] == 0
    assert scores.calibration_error.mean() < 0.1


def test_one_seed_gives_the_same_bits_and_another_does_not(logs, whole, tmp_path):
    assert same(train(logs, tmp_path / "again")[0], whole[0])
    other = train(logs, tmp_path / "other", dataclasses.replace(CONFIG, seed=1))
    assert not same(other[0], whole[0])


@pytest.mark.parametrize("killed_at", [1, 11])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(logs, whole, tmp_path, killed_at):
    class Killed(Exception):
        pass

    def progress(step, values):
        if step == killed_at:
            raise Killed

    with pytest.raises(Killed):
        train(logs, tmp_path, progress=progress)
    seen = []
    resumed = train(logs, tmp_path, progress=lambda step, values: seen.append(step))
    assert seen[0] > (killed_at - 1) // CONFIG.checkpoint_every * CONFIG.checkpoint_every  # it did not start again
    assert same(resumed[0], whole[0]) and resumed[1] == whole[1]


def test_the_best_look_is_kept_and_patience_ends_a_hopeless_run(logs, tmp_path):
    looks = {}

    def progress(step, values):
        if "validation_recall" in values:
            looks[step] = values["validation_recall"]

    wild = dataclasses.replace(CONFIG, learning_rate=3.0, steps=40, patience=2)  # ruins what the closed form found
    _, best = train(logs, tmp_path, wild, progress=progress)
    assert best["recall"] == pytest.approx(max(looks.values())) and looks[max(looks)] < best["recall"]
    assert max(looks) < 40


def test_another_configuration_is_refused(logs, tmp_path):
    train(logs, tmp_path, dataclasses.replace(CONFIG, steps=0))
    with pytest.raises(UserError, match="of other settings, model or text"):
        train(logs, tmp_path)


def test_whitening_does_not_change_the_network():
    rng = np.random.default_rng(0)
    learned = predictors.Learned(3, 2)
    network = noisy(learned)["network"]
    P, D = SPEC.num_layers + 1, SPEC.d_model
    basis = {"white": rng.normal(size=(P, D, D)).astype(np.float32), "mean": rng.normal(size=(P, D)).astype(np.float32)}
    x = rng.normal(size=(P, 1, 5, D)).astype(np.float32)
    gates = jax.nn.softmax(jnp.asarray(rng.normal(size=(P, 1, 5, SPEC.num_experts)).astype(np.float32)))
    previous = jnp.zeros((P, 1, 5, SPEC.horizon, SPEC.num_experts))
    white = np.einsum("pwtd,pde->pwte", x - basis["mean"][:, None, None], basis["white"])
    score = jax.jit(lambda network, x: learned.score_windows(network, Inputs(x, gates, previous), SPEC.top_k)[0])
    in_basis = score(network, white)
    folded = score(closed_form.unwhiten(network, basis), x)
    np.testing.assert_allclose(in_basis, folded, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("place", "h"), [(0, 0), (1, 1), (2, 2), (3, 0), (3, 2)])
def test_the_closed_form_is_the_least_squares_solution(logs, place, h):
    """Against NumPy on one table of everything that a prediction of this place for this horizon may read."""
    learned, L = predictors.Learned(3, 2), SPEC.num_layers
    network = learned.init(jax.random.key(0), SPEC, parts())["network"]  # its hidden layers say nothing yet
    rows = np.arange(40)
    solved, basis = closed_form.least_squares(network, SPEC, logs[0], rows, 1e-5, 20)
    a = logs[0].read(rows)
    inputs = window_inputs(SPEC.norm_eps, a, SPEC.horizon)
    score = jax.jit(lambda network: learned.score_windows(network, inputs, SPEC.top_k)[0])
    ours = np.asarray(score(closed_form.unwhiten(solved, basis))[place, :, h]).reshape(40, 16, -1)[:, 1:-1]
    x, gates, used = (np.asarray(z)[place] for z in inputs)
    carry, target = divmod(place + h, L)
    left = np.asarray(inputs.x)[target + 1]
    last = left[:, 1:-1] if carry else left[:, :-2]
    columns = [x[:, 1:-1], gates[:, 1:-1], used[:, 1:-1, h], last, np.ones((40, 14, 1))]
    table = np.concatenate(columns, axis=-1).reshape(40 * 14, -1)
    logits = np.asarray(a.logits, np.float32)[:, target]
    logits = logits - logits.mean(-1, keepdims=True)
    wanted = (logits[:, 2:] if carry else logits[:, 1:-1]).reshape(40 * 14, -1)
    # Gates sum to 1 but for their rounding, which is not to be learned from.
    expected = table @ np.linalg.lstsq(table, wanted, rcond=1e-3)[0]
    # The ridge, and float32 sums of badly conditioned columns, leave a little.
    assert (ours.reshape(expected.shape) - expected).std() < 0.03 * wanted.std()

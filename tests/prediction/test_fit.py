"""Fitting: it learns what the routers alone do not say, is repeatable, and resumes to the same bits."""

import contextlib
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.predictor import get_config
from moe_jax.checkpoint.families import family
from moe_jax.errors import UserError
from moe_jax.prediction import closed_form, fit, metrics, predictors, regression_rows
from moe_jax.prediction.interface import Spec
from moe_jax.prediction.learned import Inputs, score_windows, window_inputs, window_targets
from tests.families.test_real_sizes import MODELS
from tests.full_disk import files_of_at_most
from tests.prediction.synthetic import SPEC, parts, windows, written_log
from tests.prediction.test_learned import noisy

CONFIG = fit.FitConfig(
    expert_hidden=2,
    tokens=40,
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


@pytest.mark.parametrize("full_at", [0, 7])
def test_a_disk_that_fills_ends_in_one_line_and_the_run_goes_on_to_the_same_bits(
    logs, whole, tmp_path, full_at, caplog
):
    with contextlib.ExitStack() as disk:

        def progress(step, values):
            if step == full_at:
                disk.enter_context(files_of_at_most(5000))

        with pytest.raises(
            UserError, match=rf"^{tmp_path}/checkpoints cannot be written \(File too large\); free some"
        ):
            train(logs, tmp_path, progress=progress)
    seen = []
    caplog.clear()
    resumed = train(logs, tmp_path, progress=lambda step, values: seen.append(step))
    assert "already exists" not in caplog.text  # what was left of a checkpoint is gone
    assert seen[0] == full_at and same(resumed[0], whole[0]) and resumed[1] == whole[1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "9"]


def test_the_best_look_is_kept_and_patience_ends_a_hopeless_run(logs, tmp_path):
    looks = {}

    def progress(step, values):
        if "validation_recall" in values:
            looks[step] = values["validation_recall"]

    wild = dataclasses.replace(CONFIG, learning_rate=3.0, steps=40, patience=2)  # ruins what the closed form found
    _, best = train(logs, tmp_path, wild, progress=progress)
    assert best["recall"] == pytest.approx(max(looks.values())) and looks[max(looks)] < best["recall"]
    assert max(looks) < 40


def test_a_fit_that_diverges_says_so_and_keeps_the_best_look(logs, tmp_path, caplog):
    wild = dataclasses.replace(CONFIG, learning_rate=1e30, steps=40)
    params, best = train(logs, tmp_path, wild)
    assert "step 0 of 40 is kept: training diverged; lower --config.fit.learning_rate" in caplog.text
    assert best["step"] == 0 and np.isfinite(best["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    caplog.clear()
    assert same(train(logs, tmp_path, wild)[0], params) and "training diverged" in caplog.text


def test_training_that_does_not_help_says_so(logs, tmp_path, caplog):
    train(logs, tmp_path, dataclasses.replace(CONFIG, learning_rate=3.0))
    assert "step 0 of 12 is kept: training did not help" in caplog.text


@pytest.mark.parametrize("bad", ["train", "validation"])
def test_a_log_that_is_not_finite_is_refused(tmp_path, bad):
    """As an earlier version, which did not look, may have left one."""
    logs = [written_log(tmp_path / name, count=12, length=16) for name in ("train", "validation")]
    file = tmp_path / bad / "shard_00000" / "logits.npy"
    logits = np.load(file)
    logits[5, 1, 7] = np.nan
    np.save(file, logits)
    said = "MoE layer 1 are not finite" if bad == "train" else "loss on the validation windows is not finite"
    with pytest.raises(UserError, match=said) as error:
        train(logs, tmp_path / "fit")
    assert "checkpoint" in str(error.value) and "--config.dtype" in str(error.value)


def test_another_configuration_is_refused(logs, tmp_path):
    train(logs, tmp_path, dataclasses.replace(CONFIG, steps=0))
    with pytest.raises(UserError, match="of other settings, model or text"):
        train(logs, tmp_path)


def test_another_dtype_is_another_run_and_a_wrong_one_is_refused(logs, tmp_path):
    train(logs, tmp_path, dataclasses.replace(CONFIG, steps=0))
    with pytest.raises(UserError, match="of other settings, model or text"):
        train(logs, tmp_path, dataclasses.replace(CONFIG, steps=0, dtype="bfloat16"))
    with pytest.raises(UserError, match="config.fit.dtype='half' is not one of float32, bfloat16"):
        dataclasses.replace(CONFIG, dtype="half")


def test_gradient_steps_in_bfloat16_learn_as_much_and_keep_float32_weights(logs, tmp_path):
    """From tables that say nothing, so that gradient steps alone find what is found."""
    long = dataclasses.replace(CONFIG, steps=150, learning_rate=3e-2, direct_rate=1.0, evaluate_every=50)

    def solved():
        network, _ = fit._initial(long, SPEC, parts(), logs[0])
        D, L = SPEC.d_model, SPEC.num_layers
        return network, {"white": np.stack([np.eye(D, dtype=np.float32)] * L), "mean": np.zeros((L, D), np.float32)}

    configs = {"untrained": dataclasses.replace(long, steps=0), "float32": long}
    configs["bfloat16"] = dataclasses.replace(long, dtype="bfloat16")
    fits = {name: train(logs, tmp_path / name, config, solved=solved) for name, config in configs.items()}
    recall = {name: best["recall"] for name, (_, best) in fits.items()}
    assert recall["float32"] > recall["untrained"] + 0.1
    assert recall["bfloat16"] == pytest.approx(recall["float32"], abs=0.02)
    assert {str(x.dtype) for x in jax.tree.leaves(fits["bfloat16"][0])} == {"float32", "int32"}
    assert not same(fits["bfloat16"][0], fits["float32"][0])


@pytest.mark.parametrize(("dtype", "short"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_what_a_step_multiplies_is_of_its_dtype_and_its_state_is_float32(logs, dtype, short):
    state = fit._start(CONFIG, SPEC, *fit._initial(CONFIG, SPEC, parts(), logs[0]))
    step = lambda state, a: fit._update(CONFIG.schedule(), CONFIG.loss, dtype, SPEC, state, a)
    a = logs[0].read(range(4))
    # Results of matrix products with an axis of the 16 tokens: all but those that fold the whitening into tables.
    products = re.findall(r"(\w+)\[[\d,]*\b16\b[\d,]*\] = dot_general", str(jax.make_jaxpr(step)(state, a)))
    assert len(products) > 10 and set(products) == {short}
    kept = jax.eval_shape(step, state, a)[0]
    assert {str(x.dtype) for x in jax.tree.leaves((kept["network"], kept["optimizer"]))} == {"float32", "int32"}


def test_the_patience_of_the_defaults_can_end_a_run():
    fits: Any = get_config().fit
    assert fits.patience * fits.evaluate_every < fits.steps
    fit.FitConfig(**fits.to_dict(), seed=0)


def test_whitening_does_not_change_the_network():
    rng = np.random.default_rng(0)
    network = noisy(predictors.Learned(2, 9))["network"]
    (L, D), E = (SPEC.num_layers, SPEC.d_model), SPEC.num_experts
    basis = {"white": rng.normal(size=(L, D, D)).astype(np.float32), "mean": rng.normal(size=(L, D)).astype(np.float32)}
    x = rng.normal(size=(L, 1, 5, D)).astype(np.float32)
    logits, gates = rng.normal(size=(2, L, 1, 5, E)).astype(np.float32)
    white = np.einsum("lwtd,lde->lwte", x - basis["mean"][:, None, None], basis["white"])
    inputs = lambda x: Inputs(np.array([[3, 0, 9, 9, 1]]), x, logits, gates)
    score = jax.jit(lambda network, x: score_windows(network, inputs(x), SPEC.top_k)[0])
    in_basis = score(network, white)
    folded = score(closed_form.unwhiten(network, basis), x)
    np.testing.assert_allclose(in_basis, folded, rtol=1e-3, atol=1e-3)


def test_a_token_says_the_mean_of_what_followed_it(logs):
    """Drawn towards zero by one occurrence; rare tokens share the first row."""
    log, L, E = logs[0], SPEC.num_layers, SPEC.num_experts
    row = closed_form.rows_of(log, 20)
    table = closed_form.token_means(np.zeros((21, 3, L, E), np.float32), row, log, np.arange(40), 7)
    tokens, logits = log.windows.tokens, np.asarray(log.read(range(40)).logits, np.float32).swapaxes(1, 2)
    logits = logits - logits.mean(-1, keepdims=True)
    counts = np.bincount(tokens.ravel(), minlength=len(row))
    assert (counts[row == 0].max() <= counts[row > 0].min()) and sorted(row[row > 0]) == list(range(1, 21))
    for number in (0, 1, 20):
        followed = logits[:, 1:][row[tokens[:, :-1]] == number]
        np.testing.assert_allclose(table[number, 2], followed.sum(0) / (len(followed) + 1), atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_closed_form_corrects_as_regression_would(logs, layer):
    """Against NumPy, on one table of what a layer reads for the next one, and the estimate that it corrects."""
    learned, L, rows = predictors.Learned(2, 20), SPEC.num_layers, np.arange(40)
    row = closed_form.rows_of(logs[0], 20)
    network = learned.init(jax.random.key(0), SPEC, parts())["network"]  # its hidden layers say nothing yet
    solved, basis = closed_form.least_squares(network, row, SPEC, logs[0], rows, 1e-5, 20)
    quiet = closed_form.unwhiten(solved, basis) | {"echo": jnp.zeros_like(solved["echo"])}
    a = logs[0].read(rows)
    inputs = window_inputs(SPEC.norm_eps, a, row)
    score = jax.jit(lambda network: score_windows(network, inputs, SPEC.top_k)[0].reshape(L + 1, 40, 16, L, -1))
    logits = np.asarray(a.logits, np.float32)
    wanted = window_targets(logits - logits.mean(-1, keepdims=True), a.lengths, 1)[0]
    wanted = np.asarray(wanted).reshape(L + 1, 40, 16, -1)[layer + 1]
    corrected, estimates = np.asarray(score(quiet)), []
    # What is there before: of this token's layer what the layer before said of it, of the next one's what it left.
    old = corrected[layer, :, :, 1]
    x, gates = (np.asarray(z)[layer] for z in (inputs.x, inputs.gates))
    for e in range(SPEC.num_experts):
        table = np.concatenate([x, gates, np.ones((40, 16, 1)), old[..., e : e + 1]], -1)[:, 1:-1].reshape(40 * 14, -1)
        expected = table @ np.linalg.lstsq(table, wanted[:, 1:-1, e].ravel(), rcond=1e-3)[0]
        estimates.append(expected.reshape(40, 14))
    ours = corrected[layer + 1, :, 1:-1, 0]
    assert (ours - np.stack(estimates, -1)).std() < 0.03 * wanted.std()
    # The echo makes it better still.
    heard = np.asarray(score(closed_form.unwhiten(solved, basis)))[layer + 1, :, 1:-1, 0]
    error = lambda z: np.square(z - wanted[:, 1:-1]).mean()
    assert error(heard) <= error(ours) + 1e-6


def solved_by(log, rows):
    row = closed_form.rows_of(log, 20)
    network = predictors.Learned(2, 20).init(jax.random.key(0), SPEC, parts())["network"]
    return closed_form.least_squares(network, row, SPEC, log, rows, 1e-5, 20)


def test_the_closed_form_of_windows_read_in_parts_is_that_of_all_at_once(logs, monkeypatch):
    whole = solved_by(logs[0], np.arange(40))
    monkeypatch.setattr(regression_rows, "MOST", 7 * 16 * SPEC.num_layers * SPEC.num_experts)  # 7 windows at once
    in_parts = solved_by(logs[0], np.arange(40))
    inputs = window_inputs(SPEC.norm_eps, logs[0].read(range(40)), closed_form.rows_of(logs[0], 20))
    score = jax.jit(lambda solved: score_windows(closed_form.unwhiten(*solved), inputs, SPEC.top_k)[0])
    np.testing.assert_allclose(score(in_parts), score(whole), atol=1e-3)
    for name in ("white", "mean"):
        np.testing.assert_allclose(in_parts[1][name], whole[1][name], rtol=1e-4, atol=1e-4)
    assert {path.name for path in logs[0].directory.iterdir()} == {"manifest.json", "windows.npz", "shard_00000"}


def test_a_large_model_has_tokens_for_its_unknowns_where_the_log_has_them():
    a = family(MODELS["Qwen3-30B-A3B"].config).read_config(MODELS["Qwen3-30B-A3B"].config)
    large, unknowns, T = Spec.of(a, 8), a.d_model + a.num_experts + 1, 256
    counted = lambda count, spec: (
        windows(count, T),
        len(regression_rows.rows_seen(np.arange(count), windows(count, T), spec)),
    )
    plan, seen = counted(2400, large)
    assert 20 * unknowns <= seen * (T - 2) < 30 * unknowns and regression_rows.too_few(plan, large) is None
    plan, seen = counted(100, large)
    assert seen == 100
    said = regression_rows.too_few(plan, large)
    assert said and "25,400 tokens for the 2,177 unknowns" in said and "--config.max_tokens" in said
    assert counted(2400, SPEC)[1] == 480  # enough of them: one window of 5, as ever


def test_estimates_that_the_disk_does_not_take_are_one_line(logs, monkeypatch):
    monkeypatch.setattr(regression_rows, "MOST", 7 * 16 * SPEC.num_layers * SPEC.num_experts)
    with files_of_at_most(5000), pytest.raises(UserError, match="cannot be written .*free some space"):
        solved_by(logs[0], np.arange(40))

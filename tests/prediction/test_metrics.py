"""Scores against a count by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.prediction import metrics, predictors
from moe_jax.prediction.interface import Features
from moe_jax.prediction.membership import from_probability
from tests.prediction.synthetic import SPEC, activations, parts, written_log
from tests.prediction.test_predictors import run

LENGTHS = np.array([9, 2, 9, 5, 1])


class Told(predictors.Frequency):
    """Told the ids of all steps, it answers with them; `certainty` is the probability it gives."""

    def __init__(self, ids: np.ndarray, certainty: float):
        self.ids, self.certainty = jnp.asarray(ids.transpose(2, 1, 0, 3).reshape(-1, len(ids), SPEC.top_k)), certainty

    def init_state(self, spec, batch):
        return jnp.zeros((), jnp.int32)

    def apply(self, params, state, features: Features):
        ahead = jnp.minimum(state + jnp.arange(1, SPEC.horizon + 1), len(self.ids) - 1)
        hot = jax.nn.one_hot(self.ids[ahead], SPEC.num_experts).sum(-2).swapaxes(0, 1)
        return from_probability(hot * self.certainty), state + 1


def test_recall_and_brier_by_hand(tmp_path):
    log = written_log(tmp_path, count=5, length=9, lengths=LENGTHS)
    arrays = activations(SPEC, parts(), 5, 9)
    router = predictors.Router()
    params = router.init(jax.random.key(0), SPEC, parts())
    scores = metrics.evaluate(router, params, SPEC, log, batch=5)
    half = [np.asarray(x.astype(np.float16), np.float32) for x in arrays[:2]]
    p = run(router, [*half, arrays[2]])[0]  # [W, T, L, H, E]
    for layer, h in np.ndindex(SPEC.num_layers, SPEC.horizon):
        carry, target = divmod(layer + h + 1, SPEC.num_layers)
        hits, squares = [], []
        for w, length in enumerate(LENGTHS):
            for t in range(1, length - carry):
                true = set(arrays[2][w, target, t + carry].tolist())
                ours = p[w, t, layer, h]
                hits.append(len(true & set(np.argsort(-ours)[: SPEC.top_k].tolist())) / SPEC.top_k)
                squares.append(((ours - np.isin(np.arange(SPEC.num_experts), list(true))) ** 2).mean())
        np.testing.assert_allclose(scores.recall[layer, h], np.mean(hits), atol=1e-6)
        np.testing.assert_allclose(scores.brier[layer, h], np.mean(squares), atol=1e-5)


def test_an_oracle_recalls_everything_and_its_certainty_is_its_calibration_error(tmp_path):
    log = written_log(tmp_path, count=5, length=9, lengths=LENGTHS)
    ids = activations(SPEC, parts(), 5, 9)[2]
    scores = metrics.evaluate(Told(ids, 0.75), (), SPEC, log, batch=5)
    for score in (scores.recall, scores.exact, scores.covered):
        np.testing.assert_allclose(score, 1, atol=1e-6)
    share = SPEC.top_k / SPEC.num_experts
    np.testing.assert_allclose(scores.calibration_error, 0.25 * share, atol=1e-6)
    np.testing.assert_allclose(scores.brier, 0.25**2 * share, atol=1e-6)


def test_batches_and_chosen_windows_add_up(tmp_path):
    log = written_log(tmp_path, count=5, length=9, lengths=LENGTHS)
    frequency = predictors.Frequency()
    params = frequency.init(jax.random.key(0), SPEC, parts())
    whole = metrics.evaluate(frequency, params, SPEC, log, batch=8)
    np.testing.assert_allclose(metrics.evaluate(frequency, params, SPEC, log, batch=2).recall, whole.recall, atol=1e-6)
    one = metrics.evaluate(frequency, params, SPEC, log, windows=np.array([2]), batch=2)
    assert not np.allclose(one.recall, whole.recall)


def test_wrapped_targets_are_means_of_their_own():
    values = np.arange(12.0).reshape(4, 3)
    scores = metrics.Scores(values, values, values, values, values)
    assert scores.by_horizon("recall", wrapped=False) == [3.0, 2.5, 2.0]
    assert scores.by_horizon("recall", wrapped=True) == [9.0, 8.5, 8.0]
    deep = metrics.Scores(*[np.zeros((2, 2))] * 5)
    assert deep.by_horizon("recall", wrapped=False) == [0.0, None]

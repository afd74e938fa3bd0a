"""What is fitted is the use that follows, from what a cache remembers of earlier use; and it is kept."""

import dataclasses

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.offload import history
from moe_jax.offload.history import FADING, SCALES, History
from moe_jax.prediction import report, usage, usage_fit
from moe_jax.prediction.activation_log import ActivationLog, Activations
from moe_jax.prediction.usage import Usage
from moe_jax.prediction.usage_fit import LEAST_AHEAD
from tests.full_disk import files_of_at_most
from tests.prediction.synthetic import MODEL, SPEC, outputs, windows

L, E, K, T = SPEC.num_layers, SPEC.num_experts, SPEC.top_k, 40
LENGTHS = np.array([T, T, 23, T, 5, *[T] * 20])


def ids_of_subjects(count, seed=0):
    """Ids [n, L, T, K]: a window is of one of two subjects, each of which needs half of a layer's experts."""
    rng = np.random.default_rng(seed)
    subject = rng.integers(0, 2, count)
    of_subject = np.argsort(rng.random((count, L, T, E // 2)), axis=-1)[..., :K]
    return of_subject + subject[:, None, None, None] * (E // 2)


def logged(folder, lengths=LENGTHS, seed=0):
    n, d = len(lengths), SPEC.d_model
    ids, counts = ids_of_subjects(n, seed), outputs(SPEC, 0)
    log = ActivationLog(folder, SPEC, MODEL, windows(n, T, lengths))
    empty = lambda *shape: np.zeros((n, *shape), np.float32)
    arrays = Activations(empty(T, d), empty(L, T, d), empty(L, T, E), ids, empty(L, T, K), lengths)
    log.write(0, arrays, counts._replace(counts=np.ones((L, E), np.int64)))
    return log


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return logged(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def fitted(log):
    return usage_fit.fit(SPEC, log, 0)


def test_the_network_learns_which_experts_are_used_together(fitted, log, tmp_path):
    others = logged(tmp_path, seed=1)
    with_it, without = usage_fit.loss(fitted, SPEC, others), usage_fit.loss(None, SPEC, others)
    assert with_it is not None and without is not None and with_it < without - 0.02
    h = History(L, E, K / E, fitted)
    for _ in range(8):
        for layer in range(L):
            h.add(layer, [0, 1])  # expert 2 was not needed yet, but it is of the same subject
    assert h.usual()[:, 2].min() > 5 * h.usual()[:, 3:].max()


def test_training_sees_what_a_cache_remembers_and_wants_what_follows():
    lengths = np.array([T, 11, 3])
    ids = ids_of_subjects(3)
    averages, wanted, counts = (np.asarray(x) for x in usage_fit._examples(E, ids, lengths))
    for w, length in enumerate(lengths):
        seen = []
        h = History(L, E, K / E, lambda now, seen=seen: seen.append(now.copy()) or now[0])
        used = (ids[w][..., None] == np.arange(E)).any(2).astype(float)  # [L, T, E]
        for t in range(length):
            for layer in range(L):
                h.add(layer, ids[w, layer, t].tolist())
            h.usual()
            np.testing.assert_allclose(averages[t, w], seen[-1].reshape(len(SCALES), -1), atol=1e-5)
            ahead = used[:, t + 2 : length]
            assert counts[t, w, 0] == (ahead.shape[1] >= LEAST_AHEAD)
            if counts[t, w, 0]:
                weight = FADING ** np.arange(ahead.shape[1])
                expected = np.einsum("t,lte->le", weight, ahead) / weight.sum()
                np.testing.assert_allclose(wanted[t, w].reshape(L, E), expected, atol=1e-5)
        assert not counts[length:, w].any()


def test_all_windows_count_once(fitted, tmp_path):
    many = logged(tmp_path, np.full(11, T))  # more than are read together, and no multiple of them
    a = many.read(range(11), only=("ids",))
    total, count = np.asarray(usage_fit._sums(E, fitted, a.ids, a.lengths), float)
    assert usage_fit.loss(fitted, SPEC, many) == pytest.approx(total / count, rel=1e-5)
    assert count == 11 * (T - 1 - LEAST_AHEAD) * L * E


def test_the_same_log_and_seed_give_the_same_network(fitted, log, monkeypatch):
    again = usage_fit.fit(SPEC, log, 0)
    assert all((x == y).all() for x, y in zip(fitted, again, strict=True))
    monkeypatch.setattr(usage_fit, "STEPS", 3)
    told = []
    usage_fit.fit(SPEC, log, 0, lambda step, values: told.append((step, values["loss"])))
    assert [step for step, _ in told] == [1, 2, 3] and all(0 < value < 1 for _, value in told)


def test_a_network_is_kept_beside_its_predictor(fitted, tmp_path):
    assert not usage.there(tmp_path) and not usage.there("")
    usage.store(tmp_path, MODEL, fitted)
    assert usage.there(tmp_path)
    found = usage.stored(tmp_path, SPEC, MODEL)
    averages = np.random.default_rng(0).random((len(SCALES), L, E), np.float32)
    assert isinstance(found, Usage) and all(x.dtype == np.float32 for x in found)
    np.testing.assert_allclose(found(averages), fitted(averages), atol=2e-3)
    assert found(averages).shape == (L, E)
    with files_of_at_most(200), pytest.raises(UserError, match=r"usage.safetensors cannot be written \(File too large"):
        usage.store(tmp_path, MODEL, Usage(*(0 * x for x in fitted)))
    assert all((x == y).all() for x, y in zip(usage.stored(tmp_path, SPEC, MODEL), found, strict=True))


def test_a_folder_that_may_not_be_entered_is_one_line(tmp_path, nobody):
    tmp_path.chmod(0)
    with nobody(), pytest.raises(UserError, match="cannot be read: Permission denied"):
        usage.there(tmp_path)
    tmp_path.chmod(0o700)


def test_a_network_that_does_not_fit_is_refused(fitted, tmp_path, monkeypatch):
    usage.store(tmp_path, MODEL, fitted)
    with pytest.raises(UserError, match=r"usage.safetensors is of another model; choose another --config.prefetch"):
        usage.stored(tmp_path, SPEC, "another model")
    with monkeypatch.context() as patched, pytest.raises(UserError, match="of another version; train the predictor"):
        patched.setattr(history, "YOUNG", 5)
        usage.stored(tmp_path, SPEC, MODEL)
    with pytest.raises(UserError, match=r"is damaged \(wrong sizes\); train the predictor again, or delete it"):
        usage.stored(tmp_path, dataclasses.replace(SPEC, num_experts=7), MODEL)
    whole = (tmp_path / usage.FILE).read_bytes()
    for damaged in (b"", whole[:100], whole[:-10]):
        (tmp_path / usage.FILE).write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"usage.safetensors is damaged .*; train the predictor again, or delete it"
        ):
            usage.stored(tmp_path, SPEC, MODEL)
    for name in Usage._fields:
        usage.store(tmp_path, MODEL, fitted._replace(**{name: getattr(fitted, name)[..., :-1]}))
        with pytest.raises(UserError, match="wrong sizes"):
            usage.stored(tmp_path, SPEC, MODEL)
    usage.store(tmp_path, MODEL, fitted._replace(enter_bias=np.nan * fitted.enter_bias))
    with pytest.raises(UserError, match="a weight is no number"):
        usage.stored(tmp_path, SPEC, MODEL)


def test_windows_too_short_to_tell_are_said_to_be(fitted, tmp_path):
    assert usage_fit.loss(fitted, SPEC, logged(tmp_path, np.full(3, 1 + LEAST_AHEAD))) is None
    assert "not kept" in report.later_use(None, None, kept=False)
    assert "not kept" in report.later_use(0.4, 0.3, kept=False) and "kept" not in report.later_use(0.2, 0.3, kept=True)

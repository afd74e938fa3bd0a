"""Routing statistics of made-up choices whose numbers are known, from a log and from Parquet."""

import re
import shutil
import sys

import jax
import numpy as np
import pytest

from moe_jax.analysis import replay, routing
from moe_jax.errors import UserError
from moe_jax.prediction import activation_log, metrics, texts
from moe_jax.prediction.memory import Frequency, Repeat
from tests.prediction.synthetic import SPEC, parts, written_log


def test_known_numbers():
    t = np.arange(256)
    steady = np.stack([0 * t, 0 * t + 1], -1)  # always experts 0 and 1
    turning = np.stack([t % 4, (t + 2) % 4], -1)  # even; never what the token before used
    found = routing.summarise([np.stack([steady, turning, turning])], 4)
    np.testing.assert_allclose(found["entropy"], [1, 2, 2])
    np.testing.assert_allclose(found["token_locality"], [1, 0, 0])
    np.testing.assert_allclose(found["load_least"], [0, 1, 1])
    np.testing.assert_allclose(found["coactivation"], [1, 2, 2])  # 0 with 2, half of the time and not a quarter
    assert found["layer_locality"][0] == pytest.approx(0) and found["layer_locality"][1] == pytest.approx(2)
    assert found["layer_locality"][2] is None


@pytest.mark.parametrize("tokens", [64, 512, 2000, 20000])
def test_independent_choices_tell_nothing_however_few_there_are(tokens):
    experts, k = 128, 8
    ids = np.argsort(np.random.default_rng(0).random((4, tokens, experts)), -1)[..., :k]
    ids[3] = ids[2]  # but for this layer, which follows from the one before
    found = routing.summarise(np.split(ids, 2, axis=1), experts)
    *chance, certain = found["layer_locality"][:-1]
    if tokens == 64:
        assert chance == [None, None] and certain is None
    else:
        np.testing.assert_allclose(chance, 0, atol=0.05)
        assert certain == pytest.approx(7, abs=0.3)
    if tokens < 20000:  # a pair is expected tokens / 256 times
        assert found["coactivation"] == [None] * 4
    else:
        assert max(found["coactivation"]) < 1.6
    assert routing.summarise([ids], experts)["layer_locality"] == found["layer_locality"]  # the same shuffles


def test_a_log_counts_only_real_tokens(tmp_path):
    log = written_log(tmp_path, count=5, length=9, lengths=np.array([9, 2, 9, 5, 1]))
    windows, experts = routing.read_log(tmp_path)
    windows = list(windows)
    assert experts == 6 and [w.shape[1] for w in windows] == [9, 2, 9, 5, 1]
    np.testing.assert_array_equal(windows[3], log.read([3]).ids[0, :, :5])


def test_a_missing_shard_takes_its_lengths_with_it(tmp_path):
    """As our own advice "delete that folder" leaves it."""
    size = activation_log.SHARD_WINDOWS
    lengths = np.random.default_rng(2).integers(1, 6, 2 * size + 3)
    log = written_log(tmp_path, count=len(lengths), length=5, lengths=lengths)
    shutil.rmtree(tmp_path / "shard_00000")
    windows = list(routing.read_log(tmp_path)[0])
    assert [w.shape[1] for w in windows] == lengths[size:].tolist()
    np.testing.assert_array_equal(windows[-1], log.read([len(lengths) - 1]).ids[0, :, : lengths[-1]])


def test_a_damaged_shard_is_one_line(tmp_path):
    written_log(tmp_path, count=3, length=5)
    file = tmp_path / "shard_00000" / "ids.npy"
    np.save(file, np.load(file)[:2])
    with pytest.raises(UserError, match="2 windows instead of 3.*delete that folder"):
        list(routing.read_log(tmp_path)[0])


def test_what_is_no_log_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is not an activation log"):
        routing.read_log(tmp_path)
    for manifest in ("[]", "{", "{}", '{"spec": 3}', '{"spec": {"num_experts": null}}'):
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(UserError, match="is not an activation log") as error:
            routing.read_log(tmp_path)
        assert "\n" not in str(error.value)


NAMES = ("sequence", "position", "layer", "experts")


def trace(ids):
    """Columns of a Parquet file of ids [sequences, L, T, K], its rows in disorder."""
    rows = [(s, t, layer, ids[s, layer, t].tolist()) for s, layer, t in np.ndindex(ids.shape[:3])]
    rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    return dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True))


def write(file, columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), file)
    return file


def test_parquet_in_any_order(tmp_path):
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(4), (2, 3, 5, 1)), axis=-1)[..., :2]
    file = write(tmp_path / "trace.parquet", trace(ids))
    np.testing.assert_array_equal(routing.read_parquet(file, 4), ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {k: v[1:] for k, v in c.items()}, "does not have every layer of every token once"),
        (lambda c: {k: v + v for k, v in c.items()}, "two rows of one position and layer"),
        (
            lambda c: c | {"position": [p + (n == 1) for p, n in zip(c["position"], c["layer"], strict=True)]},
            "has other",
        ),
        (lambda c: {k: v for k, v in c.items() if k != "layer"}, "not a routing trace"),
        (lambda c: {k: [] for k in c}, "no rows"),
        (lambda c: c | {"layer": [None, *c["layer"][1:]]}, "a value is missing"),
        (lambda c: c | {"layer": [float(x) for x in c["layer"]]}, "must be integers"),
        (lambda c: c | {"experts": [[x + 0.9 for x in k] for k in c["experts"]]}, "must be lists of integers"),
        (lambda c: c | {"experts": [[None, 1], *c["experts"][1:]]}, "must be lists of integers"),
        (lambda c: c | {"layer": [x - 1 for x in c["layer"]]}, "layers are counted from 0"),
        (lambda c: c | {"experts": [[0], *c["experts"][1:]]}, "not a routing trace"),
        (lambda c: c | {"experts": [[] for _ in c["experts"]]}, "every row must list as many experts"),
        (lambda c: c | {"experts": [[2, 2], *c["experts"][1:]]}, "lists an expert twice"),
        (lambda c: c | {"experts": [[0, 4], *c["experts"][1:]]}, "expert 4 is not among 0 to 3; see --experts"),
        (lambda c: c | {"experts": [[0, -1], *c["experts"][1:]]}, "expert -1 is not among 0 to 3; see --experts"),
    ],
)
def test_what_is_no_trace_is_one_line(tmp_path, change, message):
    ids = np.tile([[[0, 1]], [[2, 3]]], (2, 1, 3, 1))
    file = write(tmp_path / "trace.parquet", change(trace(ids)))
    with pytest.raises(UserError, match=message) as error:
        routing.read_parquet(file, 4)
    assert "\n" not in str(error.value)


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=re.escape('pip install "moe_jax[parquet]"')):
        routing.read_parquet(tmp_path / "trace.parquet", 4)


def test_a_trace_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Layer 0 alternates between two pairs, layer 1 always uses the same pair."""
    pairs = np.array([[0, 1], [2, 3]])
    ids = np.stack([pairs[np.arange(8) % 2], pairs[np.ones(8, int)]])[None].repeat(2, 0)
    file = write(tmp_path / "trace.parquet", trace(ids))
    monkeypatch.setattr(sys, "argv", ["routing", str(file), "--experts=4", "--replay", "--budget=50", "--tokens=8"])
    routing.main()
    out = capsys.readouterr().out
    assert out.startswith("16 tokens (")
    assert re.search(r"^ +0 +2.000 +1.000", out, re.M) and re.search(r"^ +1 +1.000 +0.000", out, re.M)
    # repeat: from layer 0 the next layer's experts, always; from layer 1 the next token's layer 0, never.
    assert re.search(r"repeat same token +100.0 +-", out) and re.search(r"repeat next token +0.0 +50.0", out)
    # Four of eight experts fit. Those of layer 1 stay, those of layer 0 never: two loads a token, and two more.
    assert "4 of 8 kept" in out and re.search(r"belady 2.250", out) and re.search(r"lru 2.250", out)


def test_replayed_policies_load_what_a_count_by_hand_gives():
    # One layer, one expert at a time: 0 1 2 0 1 2 in room for two.
    texts = [np.array([0, 1, 2, 0, 1, 2]).reshape(1, 6, 1)]
    loads = replay.loads(texts, 2, 6)
    assert loads["lru"] == 1  # the one that is needed next has always gone
    assert loads["belady"] == pytest.approx(4 / 6)
    assert replay.loads(texts, 3, 6)["lru"] == replay.loads(texts, 3, 6)["belady"] == 0.5
    assert replay.loads(texts, 2, 2)["lru"] == 1
    with pytest.raises(UserError, match="does not hold the 1 that one layer needs"):
        replay.loads(texts, 0, 6)


def test_replayed_predictors_score_as_on_a_log(tmp_path):
    lengths = np.array([9, 2, 9, 5, 1])
    log = written_log(tmp_path, count=5, length=9, lengths=lengths)
    texts = [log.read([row]).ids[0, :, :length].astype(int) for row, length in enumerate(lengths)]
    found = replay.recall(texts, SPEC.num_experts, SPEC.horizon)
    for predictor in (Repeat(), Frequency()):
        params = predictor.init(jax.random.key(0), SPEC, parts())
        expected = metrics.evaluate(predictor, params, SPEC, log, batch=8)
        np.testing.assert_allclose(found[predictor.name].recall, expected.recall, atol=1e-6)


def test_a_trace_is_nothing_to_train_on(tmp_path):
    file = tmp_path / "trace.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="a routing trace holds no residuals to train on"):
        texts.plan(lambda text: [], [file], 8)


def test_long_texts_are_cut_and_nothing_of_them_is_lost(monkeypatch):
    monkeypatch.setattr(replay, "WINDOW", 4)
    texts = [np.arange(20).reshape(1, 10, 2), np.arange(6).reshape(1, 3, 2)]
    routes = replay.Routes(texts, 20)
    a = routes.read(np.arange(len(routes.windows.tokens)))
    np.testing.assert_array_equal(a.lengths, [4, 4, 2, 3])
    found = np.concatenate([ids[0, :length] for ids, length in zip(a.ids, a.lengths, strict=True)])
    np.testing.assert_array_equal(found, np.concatenate([ids[0] for ids in texts]))

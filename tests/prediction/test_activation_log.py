"""The log: what goes in comes out, shard by shard, and only for the model and text it was made for."""

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.prediction import activation_log
from moe_jax.prediction.activation_log import ActivationLog, half
from tests.prediction.synthetic import MODEL, SPEC, activations, logged, outputs, parts, windows, written_log


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(activation_log, "SHARD_WINDOWS", 4)


def test_round_trip_across_shards(tmp_path):
    log = written_log(tmp_path, count=10, length=8, lengths=np.arange(10) % 8 + 1)
    assert len(list(tmp_path.glob("shard_*"))) == 3 and log.missing() == []
    residual, logits, ids = activations(SPEC, parts(), 10, 8)
    picked = [9, 0, 4, 4]
    back = ActivationLog(tmp_path, SPEC, MODEL, log.windows).read(picked)
    np.testing.assert_array_equal(back.residual, residual[picked].astype(np.float16))
    np.testing.assert_array_equal(back.logits, logits[picked].astype(np.float16))
    np.testing.assert_array_equal(back.ids, ids[picked])
    np.testing.assert_allclose(back.gates, logged(activations(SPEC, parts(), 10, 8)).gates[picked], atol=1e-3)
    np.testing.assert_array_equal(back.lengths, log.windows.lengths[picked])
    shards = [outputs(SPEC, shard) for shard in range(3)]
    np.testing.assert_allclose(log.outputs().sums, sum(x.sums for x in shards), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(log.outputs().counts, sum(x.counts for x in shards))


def test_only_missing_shards_are_written_again(tmp_path):
    model, plan = MODEL, windows(10, 8)
    log, arrays = ActivationLog(tmp_path, SPEC, model, plan), activations(SPEC, parts(), 10, 8)
    log.write(1, logged(arrays, log.rows(1)), outputs(SPEC, 1))
    (tmp_path / "shard_00002.partial").mkdir()  # killed while writing
    log = ActivationLog(tmp_path, SPEC, model, plan)
    assert log.missing() == [0, 2]
    for shard in log.missing():
        log.write(shard, logged(arrays, log.rows(shard)), outputs(SPEC, shard))
    assert log.missing() == [] and not list(tmp_path.glob("*.partial"))
    np.testing.assert_array_equal(log.read(range(10)).ids, arrays[2])


def test_it_refuses_another_model_and_other_text(tmp_path):
    log = written_log(tmp_path, count=5, length=8)
    with pytest.raises(UserError, match="another model"):
        ActivationLog(tmp_path, SPEC, "another model", log.windows)
    with pytest.raises(UserError, match="other text"):
        ActivationLog(tmp_path, SPEC, MODEL, windows(5, 8, seed=1))
    (tmp_path / "manifest.json").write_text("[")
    with pytest.raises(UserError, match="is damaged; delete"):
        ActivationLog(tmp_path, SPEC, MODEL, log.windows)


def test_a_truncated_shard_is_named(tmp_path):
    log = written_log(tmp_path, count=5, length=8)
    file = tmp_path / "shard_00001" / "residual.npy"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="shard_00001 cannot be read"):
        log.read([0, 4])


def test_outliers_are_clipped():
    np.testing.assert_array_equal(half(np.array([1e6, -1e6, 2.0])), np.array([65504, -65504, 2], np.float16))


def test_wrong_shapes_are_refused(tmp_path):
    log = ActivationLog(tmp_path, SPEC, "m", windows(4, 8))
    with pytest.raises(ValueError, match="the log wants"):
        log.write(0, logged(activations(SPEC, parts(), 3, 8)), outputs(SPEC, 0))

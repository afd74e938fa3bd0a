"""The log: what goes in comes out, shard by shard, and only for the model and text it was made for."""

import errno
import os
import shutil
import types

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.prediction import activation_log
from moe_jax.prediction.activation_log import ActivationLog, half
from tests.full_disk import files_of_at_most
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


def test_it_refuses_a_model_in_another_dtype(tmp_path):
    plan = windows(5, 8)
    ActivationLog(tmp_path, SPEC, MODEL, plan, "bfloat16")
    assert ActivationLog(tmp_path, SPEC, MODEL, plan, "bfloat16").identity()["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="of a model in another dtype; delete it"):
        ActivationLog(tmp_path, SPEC, MODEL, plan)


def test_a_log_from_before_dtypes_were_written_down_is_one_in_float32(tmp_path):
    log = written_log(tmp_path, count=5, length=8)
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace(' "dtype": "float32",\n', ""))
    assert "dtype" not in file.read_text()
    assert ActivationLog(tmp_path, SPEC, MODEL, log.windows).missing() == []
    with pytest.raises(UserError, match="in another dtype"):
        ActivationLog(tmp_path, SPEC, MODEL, log.windows, "bfloat16")


@pytest.mark.parametrize(
    ("most", "file"), [(500, "shard_00001.partial/embedding.npy"), (1500, "shard_00001.partial/residual.npy")]
)
def test_a_disk_that_is_full_ends_in_one_line_and_loses_no_shard(tmp_path, most, file):
    arrays = activations(SPEC, parts(), 10, 8)
    log = ActivationLog(tmp_path, SPEC, MODEL, windows(10, 8))
    log.write(0, logged(arrays, log.rows(0)), outputs(SPEC, 0))
    with files_of_at_most(most), pytest.raises(UserError) as error:
        log.write(1, logged(arrays, log.rows(1)), outputs(SPEC, 1))
    said = str(error.value)
    assert f"{file}: the log cannot be written there (" in said and "make room" in said and "\n" not in said
    assert not list(tmp_path.glob("*.partial"))  # what was written of it gives its room back
    log = ActivationLog(tmp_path, SPEC, MODEL, log.windows)
    assert log.missing() == [1, 2]
    for shard in log.missing():
        log.write(shard, logged(arrays, log.rows(shard)), outputs(SPEC, shard))
    np.testing.assert_array_equal(log.read(range(10)).residual, arrays[0].astype(np.float16))


def test_a_plan_that_the_disk_does_not_take_is_one_line_too(tmp_path):
    plan = windows(10, 80)
    with files_of_at_most(1000), pytest.raises(UserError, match=r"windows.npz: the log cannot be written there"):
        ActivationLog(tmp_path / "log", SPEC, MODEL, plan)
    assert ActivationLog(tmp_path / "log", SPEC, MODEL, plan).missing() == [0, 1, 2]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/log: the log cannot be written there \(Not a directory\)"):
        ActivationLog(tmp_path / "file" / "log", SPEC, MODEL, plan)


def test_its_size_is_known_before_and_must_fit_on_the_disk(tmp_path, monkeypatch):
    plan, arrays = windows(6, 200), activations(SPEC, parts(), 6, 200)
    log = ActivationLog(tmp_path / "train", SPEC, MODEL, plan)
    expected = log.missing_bytes()
    usage = lambda free: lambda path: types.SimpleNamespace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", usage(expected))
    assert f"train {expected / 1e9:.3g} GB" in activation_log.room([log])
    monkeypatch.setattr(shutil, "disk_usage", usage(expected - 1))
    with pytest.raises(UserError, match=r"would take .* GB are free on the disk of .*lower --config.max_tokens, or"):
        activation_log.room([log])
    monkeypatch.setattr(shutil, "disk_usage", usage(expected))
    with pytest.raises(UserError, match="would take"):  # one more beside it
        activation_log.room([ActivationLog(tmp_path / "test", SPEC, MODEL, windows(1, 8)), log])
    log.write(0, logged(arrays, log.rows(0)), outputs(SPEC, 0))
    assert log.missing_bytes() < expected / 2
    log.write(1, logged(arrays, log.rows(1)), outputs(SPEC, 1))
    written = sum(file.stat().st_size for file in tmp_path.glob("train/shard_*/*"))
    assert written == pytest.approx(expected, rel=0.05) and log.missing_bytes() == 0
    activation_log.room([log])  # what is there takes no room


def test_a_truncated_shard_is_named(tmp_path):
    log = written_log(tmp_path, count=5, length=8)
    file = tmp_path / "shard_00001" / "residual.npy"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="shard_00001 cannot be read"):
        log.read([0, 4])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_only_some_files_stay_open_however_many_shards_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(activation_log, "OPEN", 7)
    log = written_log(tmp_path, count=40, length=8)
    whole, before = log.read(range(40)), open_files()
    assert len(log._open) == 7
    fresh = ActivationLog(tmp_path, SPEC, MODEL, log.windows)
    np.testing.assert_array_equal(fresh.read(range(39, -1, -1), 1).residual, whole.residual[::-1, 1])
    assert open_files() <= before + 7
    fresh = ActivationLog(tmp_path, SPEC, MODEL, log.windows)
    fresh.read(range(8), only=("logits",))
    assert sorted(fresh._open) == [(0, "logits"), (1, "logits")]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_a_shard_that_the_system_does_not_open_is_not_to_be_deleted(tmp_path, monkeypatch, number):
    log = written_log(tmp_path, count=5, length=8)

    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np, "load", refused)
    for read in (lambda: log.read([0]), log.outputs):
        with pytest.raises(UserError) as error:
            read()
        assert os.strerror(number) in str(error.value) and "delete" not in str(error.value)


def test_outliers_are_clipped():
    np.testing.assert_array_equal(half(np.array([1e6, -1e6, 2.0])), np.array([65504, -65504, 2], np.float16))


def test_wrong_shapes_are_refused(tmp_path):
    log = ActivationLog(tmp_path, SPEC, "m", windows(4, 8))
    with pytest.raises(ValueError, match="the log wants"):
        log.write(0, logged(activations(SPEC, parts(), 3, 8)), outputs(SPEC, 0))

"""Whether a file can be written is known before the run that would write it; a disk that fills is one line."""

import os
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from moe_jax import outputs
from moe_jax.errors import UserError
from tests.full_disk import files_of_at_most


def test_nothing_is_said_and_nothing_made_where_a_file_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("kept")
    for file in (tmp_path / "new", tmp_path / "old", "new"):
        outputs.check("output", file)
    assert [file.name for file in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "kept"


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name, message in (("", "is a folder"), ("no/x", "does not exist; make"), ("file/x", "does not exist")):
        with pytest.raises(UserError, match=f"^--report=.*{message}"):
            outputs.check("report", tmp_path / name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    for file in (tmp_path / "file", "/proc/new"):
        with pytest.raises(UserError, match=f"^--report={file} cannot be written"):
            outputs.check("report", file)


def test_a_place_that_may_not_even_be_looked_at_is_one_line(tmp_path, nobody):
    (tmp_path / "closed").mkdir(mode=0)
    for file in (tmp_path / "closed" / "x.json", tmp_path / ("x" * 300)):
        with nobody(), pytest.raises(UserError, match=f"^--report={file} cannot be written .*; choose another place"):
            outputs.check("report", file)


def test_a_folder_is_made_or_said_to_be_impossible(tmp_path):
    outputs.check_folder("--output", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    outputs.make_folder("--output", tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path / "file" / "b", "no folder can be made"),
        (Path("/proc/sys"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=f"^--output={folder}.*{message}.*; choose another place"):
            outputs.make_folder(f"--output={folder}", folder)


def test_a_disk_that_fills_is_one_line_and_keeps_no_half_of_a_file(tmp_path):
    file, again = tmp_path / "out.json", "free some space and give the same command again"
    with (
        files_of_at_most(1000),
        pytest.raises(UserError, match=rf"^{file} cannot be written \(File too large\); {again}$"),
    ):
        outputs.write_json(file, list(range(10_000)))
    assert not file.exists()
    with pytest.raises(
        UserError, match=rf"full cannot be written \(No space left on device\); {again}, which goes on where"
    ):
        outputs.write_json("/dev/full", [], resumes=True)
    assert Path("/dev/full").exists()
    outputs.write_json(file, [1])
    assert file.read_text() == "[\n 1\n]\n"


def test_libraries_that_write_say_it_in_their_own_words(tmp_path):
    weights = {"a": np.random.default_rng(0).random(10_000)}

    def orbax(folder):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, weights)

    for write in (lambda folder: save_file(weights, folder.with_suffix(".safetensors")), orbax):
        with (
            files_of_at_most(5000),
            pytest.raises(UserError, match=f"^{tmp_path} cannot be written \\(File too large"),
            outputs.room(tmp_path),
        ):
            write(tmp_path / "weights")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no"), OSError("no number"), ValueError("os_error_code='2'")])
def test_what_is_no_full_disk_keeps_its_traceback(tmp_path, error):
    file = tmp_path / "kept"
    with pytest.raises(type(error)) as raised, outputs.writing(file):
        file.write_text("")
        raise error
    assert raised.value is error and file.exists()

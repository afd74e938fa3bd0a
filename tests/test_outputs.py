"""Whether a file can be written is known before the run that would write it."""

import os

import pytest

from moe_jax import outputs
from moe_jax.errors import UserError


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

"""Files that a run writes: checked at its start where they come at its end, and a disk that fills said in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError


def check(flag: str, file: str | Path) -> None:
    """Does nothing if `file` can be written as far as one can know beforehand. Nothing is left.

    Args:
      flag: that named it, without the dashes.

    Raises:
      UserError: it is a folder, its folder is missing, or neither it nor a file beside it can be written.
    """
    file = Path(file)
    folder = file.absolute().parent
    with _elsewhere(f"--{flag}={file}"):
        if file.is_dir():
            raise UserError(f"--{flag}={file} is a folder; name a file in it")
        if not folder.is_dir():
            raise UserError(f"--{flag}={file}: its folder does not exist; make {folder} first")
        if not file.exists():
            check_folder(f"--{flag}={file}", folder)
        elif not os.access(file, os.W_OK):
            raise UserError(f"--{flag}={file} cannot be written; choose another place")


def check_folder(what: str, folder: Path) -> None:
    """Raises UserError, beginning with `what`, where no file can be made in a folder, or it cannot be made itself."""
    with _elsewhere(what):
        while not folder.exists():
            folder = folder.absolute().parent
        with tempfile.TemporaryFile(dir=folder):
            pass


def make_folder(what: str, folder: Path) -> None:
    """Makes a folder that a run writes to. Raises UserError, beginning with `what`, where it or a file in it cannot be
    made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{what}: no folder can be made there ({error.strerror}); choose another place") from None
    check_folder(what, folder)


def claim(folder: Path, run: dict[str, Any], others: str) -> None:
    """Marks a folder's checkpoints as of this run, so that no other run goes on with them.

    Args:
      run: what the run depends on (JSON).
      others: what the checkpoints are of if not of this run, for the message.

    Raises:
      UserError: they are of another run.
    """
    file, text = folder / "run.json", json.dumps(run, indent=1, sort_keys=True) + "\n"
    if file.exists() and file.read_text() == text:
        return
    checkpoints = folder / "checkpoints"
    if checkpoints.exists() and any(checkpoints.iterdir()):
        raise UserError(f"{checkpoints} holds {others}; delete it or choose another --config.output")
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, file)


@contextlib.contextmanager
def _elsewhere(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror}); choose another place") from None


@contextlib.contextmanager
def room(place: str | Path, resumes: bool = False) -> Iterator[None]:
    """What is written to `place`, a file or folder, while this lasts may not fit on the disk.

    Args:
      resumes: the same command goes on where it stopped.

    Raises:
      UserError: the disk is full. Other errors stay what they are.
    """
    try:
        yield
    except Exception as error:
        if (number := _error_number(error)) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        how = ", which goes on where this one stopped" if resumes else ""
        raise UserError(
            f"{place} cannot be written ({os.strerror(number)}); free some space and give the same command again{how}"
        ) from None


@contextlib.contextmanager
def writing(file: str | Path, resumes: bool = False) -> Iterator[Path]:
    """As `room`, for a file that is written whole: where the disk is full, no half of it is left."""
    file = Path(file)
    try:
        with room(file, resumes):
            yield file
    except UserError:
        if file.is_file():  # not a device
            file.unlink()
        raise


def write_json(file: str | Path, document: object, resumes: bool = False) -> None:
    """Writes a document for programs, as `writing` does."""
    with writing(file, resumes):
        Path(file).write_text(json.dumps(document, indent=1) + "\n")


def _error_number(error: Exception) -> int | None:
    """Of the operating system. Libraries that are not Python say it in their message: TensorStore, safetensors."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\bos_error_code='(\d+)'|\(os error (\d+)\)", str(error))
    return int(found[1] or found[2]) if found else None

"""Files that a run will write at its end, checked at its start: measurements are not lost to a mistyped path."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

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
    if file.is_dir():
        raise UserError(f"--{flag}={file} is a folder; name a file in it")
    if not folder.is_dir():
        raise UserError(f"--{flag}={file}: its folder does not exist; make {folder} first")
    if not file.exists():
        check_folder(f"--{flag}={file}", folder)
    elif not os.access(file, os.W_OK):
        raise UserError(f"--{flag}={file} cannot be written; choose another place")


def check_folder(what: str, folder: Path) -> None:
    """Raises UserError, beginning with `what`, where no file can be made in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror}); choose another place") from None

"""Files that a run will write at its end, checked at its start: measurements are not lost to a mistyped path."""

from __future__ import annotations

import os
from pathlib import Path

from moe_jax.errors import UserError


def check(flag: str, file: str | Path) -> None:
    """Does nothing if `file` can be written as far as one can know beforehand. Nothing is created.

    Args:
      flag: that named it, without the dashes.

    Raises:
      UserError: it is a folder, its folder is missing, or either may not be written.
    """
    file = Path(file)
    folder = file.absolute().parent
    if file.is_dir():
        raise UserError(f"--{flag}={file} is a folder; name a file in it")
    if not folder.is_dir():
        raise UserError(f"--{flag}={file}: its folder does not exist; make {folder} first")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise UserError(f"--{flag}={file} cannot be written; choose another place")

"""A cap on the memory of a process, page cache included: a memory control group of Linux, version 1 or 2."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from moe_jax.errors import UserError

ROOT = Path("/sys/fs/cgroup")


class MemoryCap:
    """A control group with a limit. A context manager: leaving it removes the group.

    Attributes:
      nbytes: the limit.
    """

    def __init__(self, nbytes: int):
        """
        Raises:
          UserError: this system does not let us make one.
        """
        self.nbytes, name = nbytes, f"moe_jax-{os.getpid()}-{time.monotonic_ns()}"
        self._v2 = not (ROOT / "memory").is_dir()
        self._group = ROOT / name if self._v2 else ROOT / "memory" / name
        limit = "memory.max" if self._v2 else "memory.limit_in_bytes"
        try:
            if self._v2:
                with contextlib.suppress(OSError):
                    (ROOT / "cgroup.subtree_control").write_text("+memory")
            self._group.mkdir()
            (self._group / limit).write_text(str(nbytes))
        except OSError as error:
            self.close()
            raise UserError(
                f"a memory cap needs a writable memory control group, and {self._group} cannot be made"
                f" ({error.strerror}): run as root where the host delegates it; without one nothing is compared"
            ) from None

    def run(self, command: Sequence[str], environment: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess:
        """Runs a command in the group. Exit code -9: it was killed for its memory (or something else killed it).

        Raises:
          subprocess.TimeoutExpired: it is killed by then.
        """
        enter = ["sh", "-c", f'echo $$ > {self._group}/cgroup.procs && exec "$@"', "sh", *command]
        return subprocess.run(enter, env=environment, capture_output=True, text=True, timeout=timeout_s)

    def peak_bytes(self) -> int:
        """Most memory used at once so far, page cache included."""
        file = "memory.peak" if self._v2 else "memory.max_usage_in_bytes"
        return int((self._group / file).read_text())

    def close(self) -> None:
        """Removes the group, once its processes have ended."""
        for _ in range(50):
            try:
                self._group.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)

    def __enter__(self) -> MemoryCap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    """Makes reads of these files (or of all files in these folders) go to the disk; checks that it has worked.

    Raises:
      RuntimeError: pages stay, for instance because a process maps them.
    """
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # dirty pages cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    total = sum(file.stat().st_size for file in files)
    if (left := sum(map(cached_bytes, files))) > 0.01 * total:
        raise RuntimeError(f"{left} of {total} bytes stay in the page cache: is a process using {paths[0]}?")


def cached_bytes(file: Path) -> int:
    """Bytes of a file that are in the page cache."""
    size = file.stat().st_size
    if not size:
        return 0
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(size), found)
        del start
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in found) * mmap.PAGESIZE

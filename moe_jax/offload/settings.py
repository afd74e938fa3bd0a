"""How experts are moved on one kind of backend: defaults with their reasons, or what `python -m moe_jax.probe` found.

Nothing here imports jax: settings can be read before a backend starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

from moe_jax.errors import UserError

Mode = Literal["thread", "inline"]
BLOCK = 4096
"""Bytes that offsets and sizes of O_DIRECT reads are multiples of."""
AGAIN = "run `python -m moe_jax.probe` again, or delete the file"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What differs between backends and machines, and changes speed only, never a result.

    Attributes:
      issue_mode: who calls `device_put`: "thread" is a copy thread, "inline" the decode thread, before the compute that
        the copy hides behind.
      read_threads: threads that read from disk.
      slice_bytes: of one disk read. A demand waits for at most one slice of speculation per thread.
      inline_quota_bytes: speculative bytes in flight at most in inline mode; one expert is always allowed. A demand
        waits for all of it.
    """

    issue_mode: Mode
    # Two hide each other's latency: a token of drawn text in 45.5 and 22.2 ms (15 and 60% of 5.4 MB experts in memory)
    # where one thread takes 46.9 and 22.9, and with slices of 2 MiB two take 51.4 and 24.4, at 2.7 GB/s.
    read_threads: int = 2
    slice_bytes: int = 2**22
    inline_quota_bytes: int = 0

    @classmethod
    def default(cls, platform: str) -> Settings:
        """For a platform as jax names it ("cpu", "gpu", "tpu"), with nothing measured.

        CPU: a thread, because device_put computes on the calling thread's core and only another thread overlaps
        (measured).
        GPU: inline, because a new buffer is usable only after the compute enqueued before its allocation, so copies
        must be issued before the compute they hide behind, which only the decode thread can arrange (XLA sources; on an
        H100 0.7 of a copy is hidden then, 0.07 otherwise). 4 MiB take 0.16 ms at 25 GB/s (PCIe 4.0 x16), about as long
        as the smallest copy.
        TPU: as GPU, unverified.
        """
        return cls("thread") if platform == "cpu" else cls("inline", inline_quota_bytes=4 * 2**20)

    @classmethod
    def load(cls, platform: str, file: str | Path | None = None) -> Settings:
        """What the probe wrote for this platform, or the default where it never ran.

        Args:
          platform: `jax.default_backend()`.
          file: another place than `settings_file(platform)`.

        Raises:
          UserError: the file is damaged, of another platform, or a value is out of range.
        """
        file = Path(file) if file else settings_file(platform)
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return cls.default(platform)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read ({error}); {AGAIN}") from None
        try:
            document = json.loads(text)
            measured_on, values = document["platform"], document["settings"]
            settings = cls(**values)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file} is no settings file of this version; {AGAIN}") from None
        if measured_on != platform:
            raise UserError(f"{file} was measured on {measured_on!r}, this is {platform!r}; {AGAIN}")
        if wrong := settings.fault():
            raise UserError(f"{file}: {wrong}; {AGAIN}")
        return settings

    def save(self, file: str | Path, platform: str, measured: dict[str, Any]) -> None:
        """Writes a file that `load` reads, with the measurements that the settings come from.

        Raises:
          UserError: it cannot be written there.
        """
        file = Path(file)
        document = {"platform": platform, "settings": dataclasses.asdict(self), "measured": measured}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Replaced at once: a run that starts meanwhile reads the old file or the new one.
            partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, file)
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}); give another --output") from None

    def fault(self) -> str:
        """What is wrong with the values; empty: nothing."""
        if self.issue_mode not in get_args(Mode):
            return f"issue_mode {self.issue_mode!r} is not one of {', '.join(get_args(Mode))}"
        for name, least in (("read_threads", 1), ("slice_bytes", BLOCK), ("inline_quota_bytes", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                return f"{name} must be an integer of at least {least}, not {value!r}"
        if self.slice_bytes % BLOCK:
            return f"slice_bytes must be a multiple of {BLOCK}, not {self.slice_bytes}"
        return ""


def cache_folder() -> Path:
    """Where everything that moe_jax remembers between runs lies: `$XDG_CACHE_HOME/moe_jax`, or `~/.cache/moe_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "moe_jax"


def settings_file(platform: str) -> Path:
    """Where the probe writes what it found, and `Settings.load` looks for it."""
    return cache_folder() / f"settings-{platform}.json"

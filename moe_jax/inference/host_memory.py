"""How much memory this process may still take on the host: of the machine, and of the container that it runs in."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
MEMBERSHIP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes, with those that the kernel would take back from its page cache."""
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([free, *_left_to_groups()]))


def _left_to_groups() -> list[int]:
    """Of each control group with a limit that the process is in, its own and those around it."""
    left = []
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, names, prefix = GROUPS, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            top, names, prefix = GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            try:
                limit, used = ((group / name).read_text().strip() for name in names)
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # a container may not see those around it
                continue
            if limit != "max":
                cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                left.append(int(limit) - int(used) + cache)
    return left

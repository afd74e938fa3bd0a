"""What "auto" takes for free memory: what the kernel gives back counts, and so does a container's limit."""

import pytest

from moe_jax.inference import host_memory

GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """20 GB available, of which 1 GB is free; the process is in group /a/b of version 2."""
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")
    (tmp_path / "meminfo").write_text(f"MemFree: {GB // 1024} kB\nMemAvailable: {20 * GB // 1024} kB\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    return tmp_path


def group(folder, limit, used, cache, names=("memory.max", "memory.current"), prefix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cache}\n{prefix}active_file 0\n")


def about(value):
    return pytest.approx(value, abs=2048)


def test_the_page_cache_can_be_had(machine):
    assert host_memory.available() == about(20 * GB)


def test_a_container_has_what_its_limit_leaves(machine):
    group(machine / "groups/a/b", 8 * GB, 5 * GB, 2 * GB)
    assert host_memory.available() == 5 * GB
    group(machine / "groups/a/b", "max", 5 * GB, 2 * GB)
    assert host_memory.available() == about(20 * GB)


def test_a_group_around_it_counts_too(machine):
    group(machine / "groups/a/b", 8 * GB, GB, 0)
    group(machine / "groups/a", 4 * GB, 2 * GB, 0)
    assert host_memory.available() == 2 * GB
    group(machine / "groups/a", 4 * GB, 6 * GB, 0)
    assert host_memory.available() == 0


def test_version_1(machine):
    (machine / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/x\n")
    names = "memory.limit_in_bytes", "memory.usage_in_bytes"
    group(machine / "groups/memory/x", 8 * GB, 5 * GB, GB, names, "total_")
    group(machine / "groups/memory", 2**63 - 4096, 5 * GB, GB, names, "total_")
    assert host_memory.available() == 4 * GB


def test_where_the_kernel_tells_nothing(machine):
    (machine / "meminfo").unlink()
    (machine / "cgroup").unlink()
    assert host_memory.available() > 0

"""The probe: what it chooses from what it measured, and that it measures and writes what a run then reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import cli
from moe_jax.offload.measure import MIB, SLICES, THREADS, Overlap, Put, Read, choose
from moe_jax.offload.settings import Settings

ROOT = Path(__file__).parents[2]


def puts(*rates):
    """Calls of 1, 2, 4, ... MiB at so many GB/s."""
    return [Put(MIB << i, 1, (MIB << i) / (rate * 1e9)) for i, rate in enumerate(rates)]


def overlaps(before, after, thread):
    """So much hidden of a copy of 10 ms."""
    ways = {"before": before, "after": after, "thread": thread}
    return [Overlap(c, how, 0.01, 0.01, 0.02 - 0.01 * x) for c in ("memory", "cache") for how, x in ways.items()]


def reads(table):
    """GB/s by size (rows) and threads (columns)."""
    rows = zip(SLICES, table, strict=True)
    return [Read(s, t, 1e9 * x) for s, row in rows for t, x in zip(THREADS, row, strict=True)]


EVEN = reads([[1, 1, 1]] * 4)


def test_hidden_is_a_share_of_the_shorter_one():
    assert Overlap("memory", "before", 4.0, 10.0, 11.0).hidden == 0.75
    assert Overlap("memory", "before", 10.0, 4.0, 14.0).hidden == 0


@pytest.mark.parametrize(
    "platform, before, thread, mode",
    [
        ("gpu", 0.9, 0.85, "inline"),
        ("gpu", 0.8, 0.85, "inline"),  # near: the default stays
        ("gpu", 0.2, 0.9, "thread"),
        ("cpu", 0.1, 0.8, "thread"),
        ("cpu", 0.8, 0.75, "thread"),
        ("cpu", 0.9, 0.1, "inline"),
    ],
)
def test_chooses_who_issues(platform, before, thread, mode):
    assert choose(platform, puts(1), overlaps(before, 0, thread), EVEN).issue_mode == mode


@pytest.mark.parametrize(
    "rates, quota",
    [((5, 10, 19, 20, 20), 4 * MIB), ((20, 20), MIB), ((1, 2, 4, 8, 16), 16 * MIB)],
)
def test_keeps_just_enough_in_flight(rates, quota):
    assert choose("gpu", puts(*rates), overlaps(1, 0, 0), EVEN).inline_quota_bytes == quota
    assert choose("cpu", puts(*rates), overlaps(0, 0, 1), EVEN).inline_quota_bytes == 0


@pytest.mark.parametrize(
    "table, threads, size",
    [
        ([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]], 2, 4 * MIB),
        ([[0.3, 0.8, 0.9], [0.5, 1.2, 1.25], [0.8, 1.2, 1.3], [1.0, 1.3, 1.3]], 2, 4 * MIB),
        ([[0.3, 0.8, 1.6], [0.5, 1.2, 2.2], [0.8, 1.2, 2.0], [1.0, 1.3, 2.3]], 4, MIB),
        ([[0.3, 0.8, 1.3], [0.5, 1.0, 1.3], [0.8, 1.1, 1.3], [1.0, 1.3, 1.3]], 2, 8 * MIB),
        ([[0.1, 0.1, 0.1], [0.2, 0.2, 0.2], [0.3, 0.3, 0.3], [1.0, 1.0, 1.0]], 2, 8 * MIB),
        ([[1.3, 1.0, 1.0], [1.3, 1.0, 1.0], [1.1, 1.0, 1.0], [1.1, 1.0, 1.0]], 1, SLICES[0]),
    ],
)
def test_chooses_the_default_if_it_is_near_the_best_and_else_the_least_that_is(table, threads, size):
    settings = choose("cpu", puts(1), overlaps(0, 0, 1), reads(table))
    assert (settings.read_threads, settings.slice_bytes) == (threads, size) and not settings.fault()


def probe(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    cache = {"XDG_CACHE_HOME": str(folder), "JAX_PLATFORMS": "cpu"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **cache, **cli.MALLOC}
    command = [sys.executable, "-m", "moe_jax.probe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_measures_and_writes_what_a_run_reads(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(os.urandom(64 * MIB))
    result = probe(tmp_path, "--seconds=0", f"--file={tmp_path / 'file'}")
    assert result.returncode == 0, result.stderr
    for words in ("host to device", "by a thread", "random reads from disk", "bfloat16", "issue_mode = "):
        assert words in result.stdout
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = Settings.load("cpu")
    assert settings.slice_bytes in SLICES and settings.read_threads in THREADS
    document = json.loads((tmp_path / "moe_jax" / "settings-cpu.json").read_text())
    assert len(document["measured"]["reads"]) == len(SLICES) * len(THREADS)
    assert all(0 < rate < 1e12 for rate in document["measured"]["matvec_bytes_per_s"].values())


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--file=x", "--folder=y"], "not both"),
        (["--file=absent"], "--file=absent: No such file or directory; give another one"),
        (["--folder=absent"], "--folder=absent: No such file or directory; give another one"),
        ([f"--file={__file__}"], "is smaller than 67108864 bytes; give a larger one"),
    ],
)
def test_mistakes(tmp_path, arguments, says):
    result = probe(tmp_path, *arguments)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "output, says",
    [
        ("/proc/s.json", "--output=/proc/s.json cannot be written"),
        (f"{__file__}/s.json", f"--output={__file__}/s.json: no folder can be made there"),
        (str(ROOT), f"--output={ROOT} is a folder; name a file in it"),
    ],
)
def test_where_it_cannot_write_it_measures_nothing(tmp_path, output, says):
    result = probe(tmp_path, "--seconds=0", f"--output={output}")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("probe.py: error: " + says) and result.stderr.count("\n") == 1

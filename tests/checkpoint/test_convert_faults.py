"""What goes wrong outside the program: bad sources, a full disk, SIGKILL. Nothing half-written is left as if whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.checkpoint import convert as module
from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.converted import JOURNAL, MANIFEST, open_checkpoint
from moe_jax.checkpoint.hf import INDEX, SINGLE, HFCheckpoint
from moe_jax.errors import UserError
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture
def sharded(tmp_path):
    """A tiny Mixtral (float32, which every reader of safetensors knows) in three shards."""
    directory = write_tiny(tmp_path / "source", dtype=np.float32)
    weights = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    shard = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(weights)}
    for file in set(shard.values()):
        save_file({name: weights[name] for name in weights if shard[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": shard}))
    return directory


def edit(directory: Path, change) -> None:
    """Changes the tensors of the shard that holds W2, and the index with it."""
    index = json.loads((directory / INDEX).read_text())
    file = index["weight_map"][W2]
    weights = load_file(directory / file)
    change(weights)
    save_file(weights, directory / file)
    others = {name: f for name, f in index["weight_map"].items() if f != file}
    (directory / INDEX).write_text(json.dumps({"weight_map": others | dict.fromkeys(weights, file)}))


def truncate(directory: Path) -> None:
    file = sorted(directory.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def duplicate(directory: Path) -> None:
    """In a second shard too."""
    other = next(f for f in sorted(directory.glob("*.safetensors")) if W2 not in load_file(f))
    save_file(load_file(other) | {W2: np.zeros((32, 24), np.float32)}, other)


FAULTS = {
    "truncated shard": (truncate, ["model-00002-of-00003.safetensors", "is truncated"]),
    "missing shard": (lambda d: sorted(d.glob("*.safetensors"))[0].unlink(), ["lacks file model-00001-of-00003"]),
    "wrong dtype": (lambda d: edit(d, lambda w: w.update({W2: w[W2].astype(np.int32)})), [W2, "is I32"]),
    "another dtype": (lambda d: edit(d, lambda w: w.update({W2: w[W2].astype(np.float16)})), [W2, "mixes dtypes"]),
    "wrong shape": (lambda d: edit(d, lambda w: w.update({W2: w[W2][:, :-1].copy()})), [W2, "[32, 23], not [32, 24]"]),
    "missing expert": (lambda d: edit(d, lambda w: w.pop(W2)), ["lacks tensor", W2]),
    "unexpected tensor": (lambda d: edit(d, lambda w: w.update(ghost=w[W2])), ["unexpected tensor ghost"]),
    "duplicate tensor": (duplicate, [W2, "twice"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_sources_are_refused_before_anything_is_written(sharded, tmp_path, fault):
    damage, parts = FAULTS[fault]
    damage(sharded)
    with pytest.raises(UserError) as caught:
        convert(HFCheckpoint(sharded), tmp_path / "out")
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_script_says_it_in_one_line(sharded, tmp_path):
    edit(sharded, lambda w: w.pop(W2))
    command = [sys.executable, "convert.py", f"--checkpoint={sharded}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and W2 in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_source_cut_while_it_is_read(sharded, tmp_path):
    def cut(done, total):
        for file in sharded.glob("*.safetensors"):
            os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(UserError, match="ended while it was read"):
        convert(HFCheckpoint(sharded), tmp_path / "out", progress=cut)
    assert not (tmp_path / "out" / MANIFEST).exists()


# A full disk.


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            return filler


def test_a_disk_that_is_too_small(small_disk, tmp_path):
    source = write_tiny(tmp_path / "source")
    filler = fill(small_disk)
    os.truncate(filler, filler.stat().st_size - 100_000)
    with pytest.raises(UserError, match=r"needs 0\.\d MB and the disk of .* has 0\.\d MB free"):
        convert(HFCheckpoint(source), small_disk / "out")
    assert not list((small_disk / "out").iterdir())


@pytest.mark.parametrize("after", [0, 20, 50, 80, 10**9])
def test_a_disk_that_becomes_full(small_disk, tmp_path, after):
    """At any moment, the last small files too (never in the blocks); with space again, it goes on to the same bytes."""
    source, calls = HFCheckpoint(write_tiny(tmp_path / "source")), 0
    convert(source, tmp_path / "whole")

    def report(done, total):
        nonlocal calls
        calls += 1
        if calls == after or done == total:
            fill(small_disk)

    with pytest.raises(UserError, match="is full; free some space and give the same command again"):
        convert(source, small_disk / "out", progress=report)
    with pytest.raises(UserError, match="interrupted"):
        open_checkpoint(small_disk / "out")
    (small_disk / "filler").unlink()
    convert(source, small_disk / "out")
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


def test_other_failures_of_the_disk(tmp_path, monkeypatch):
    source = HFCheckpoint(write_tiny(tmp_path / "source"))

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "write_durably", broken)
    with pytest.raises(UserError, match=r"--output=.* cannot be written: Input/output error"):
        convert(source, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(source, "expert", broken)
    with pytest.raises(UserError, match=r"source cannot be read: Input/output error"):
        convert(source, tmp_path / "out")


# SIGKILL.

SLOWLY = """
import sys, time
from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.hf import HFCheckpoint
convert(HFCheckpoint(sys.argv[1]), sys.argv[2], sys.argv[3], lambda done, total: time.sleep(0.01))
"""


@pytest.mark.parametrize("form", ["none", "int4"])
def test_killed_and_resumed(tmp_path, form):
    source, output = write_tiny(tmp_path / "source"), tmp_path / "out"
    convert(HFCheckpoint(source), tmp_path / "whole", form)
    rng, kills = random.Random(0), 0
    for finished in (0, 2, 4):  # files that it has finished when it is killed, and a little later
        child = subprocess.Popen([sys.executable, "-c", SLOWLY, source, output, form], cwd=ROOT)
        while child.poll() is None and files_finished(output) < finished:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        if child.wait() == -signal.SIGKILL and not (output / MANIFEST).exists():
            kills += 1
            with pytest.raises(UserError, match="interrupted"):
                open_checkpoint(output)
    assert kills == 3
    command = [sys.executable, "convert.py", f"--checkpoint={source}", f"--output={output}", f"--quantization={form}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert contents(output) == contents(tmp_path / "whole")


def files_finished(output: Path) -> int:
    """-1 before the conversion has begun."""
    try:
        return len(json.loads((output / JOURNAL).read_text())["finished"])
    except FileNotFoundError:
        return -1


def test_leftovers_of_a_kill_are_not_in_the_way(tmp_path):
    """A directory, or a journal not named yet, is all that there is."""
    source = HFCheckpoint(write_tiny(tmp_path / "source"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{JOURNAL}.partial").write_text('{"for')
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

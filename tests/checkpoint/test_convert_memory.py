"""What a conversion takes of memory: at most two experts and the largest dense tensor, whatever the model's size."""

import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from moe_jax.checkpoint.bank_file import nbytes
from moe_jax.checkpoint.converted import Converted
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.checkpoint.read_ahead import read_ahead
from tests.checkpoint.big import drop_from_cache, mixtral_of, write_big

ROOT = Path(__file__).parents[2]
GB = 1e9
# Runs the script's own function, after having made what its first conversion makes once: imports, compiled functions.
MEASURED = """
import re, sys
import ml_dtypes
import numpy as np
from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.checkpoint.quantize import quantize
from moe_jax.model.experts import ExpertWeights
source = HFCheckpoint(sys.argv[1])
small = np.ones((64, 64), ml_dtypes.bfloat16)
quantize(ExpertWeights(small, small), sys.argv[3])
print(int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024, flush=True)
convert(source, sys.argv[2], sys.argv[3])
"""


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 when it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) * 1024 if found else 0


def peak_of(command: list[str]) -> tuple[int, str]:
    """The largest RssAnon of a process, looked at every millisecond, and what it prints."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.returncode is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.001)

    watching = threading.Thread(target=watch)
    watching.start()
    printed, _ = process.communicate()
    watching.join()
    assert process.returncode == 0
    return peak, printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_gigabytes_in_less_than_one(tmp_path):
    """Experts of the size of Mixtral-8x7B's, 352 MB each."""
    if (free := shutil.disk_usage(tmp_path).free) < 10 * GB:
        pytest.skip(f"needs 10 GB of disk, {tmp_path} has {free / GB:.1f}")
    try:
        assert write_big(tmp_path / "source", mixtral_of(4 * GB)) > 4 * GB
        drop_from_cache(tmp_path / "source")
        assert converted_peak(tmp_path / "source", tmp_path / "out", "none") < GB
        source, made = HFCheckpoint(tmp_path / "source"), Converted(tmp_path / "out")
        for key in ((0, 0), (1, source.architecture.num_experts - 1)):
            assert np.array_equal(made.expert(*key).gate_up, source.expert(*key).gate_up)
    finally:
        shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quantising_takes_no_more(tmp_path):
    """Experts of 88 MB."""
    try:
        write_big(tmp_path / "source", mixtral_of(0.5 * GB, 2048, 7168))
        for form in ("bf16", "packed", "int8", "int4"):
            converted_peak(tmp_path / "source", tmp_path / form, form)
    finally:
        shutil.rmtree(tmp_path)


def converted_peak(source: Path, output: Path, form: str) -> int:
    """The peak of RssAnon in bytes; what the conversion adds to its process is checked."""
    peak, printed = peak_of([sys.executable, "-c", MEASURED, str(source), str(output), form])
    opened, own = HFCheckpoint(source), peak - int(printed)
    bound = 2 * opened.expert_bytes + max(map(nbytes, opened.dense_spec.values()))
    print(
        f"{form}: RssAnon {peak / 1e6:.0f} MB, {own / 1e6:.0f} MB of them for the conversion; bound {bound / 1e6:.0f}"
    )
    assert opened.expert_bytes < own < bound
    return peak


class Held:
    """Counts what is alive."""

    alive, most = 0, 0

    def __init__(self, size: int):
        self.size = size
        Held.alive += size
        Held.most = max(Held.most, Held.alive)

    def __del__(self):
        Held.alive -= self.size


@pytest.mark.parametrize("limit, most", [(0, 9), (9, 9), (10, 10), (12, 12), (100, 16)])
def test_reading_ahead_stays_within_its_limit(limit, most):
    """Sizes 1 to 9 in turn; what does not fit beside the one before it is read only when that is gone."""
    sizes = {f"{i}": size for i, size in enumerate([1, 2, 9, 3, 9, 1, 9, 7, 5, 5])}
    Held.alive = Held.most = 0
    got = []
    for value in read_ahead(list(sizes), lambda name: Held(sizes[name]), sizes.__getitem__, sizes.__getitem__, limit):
        time.sleep(0.01)  # the next one arrives
        got.append(value.size)
        del value
    assert got == list(sizes.values())
    assert Held.most == most and Held.alive == 0


def test_what_reading_raises_comes_in_its_turn():
    def read(name):
        return 1 // (name != "b")

    one = lambda name: 1
    values = read_ahead(["a", "b", "c"], read, one, one, 2)
    assert next(values) == 1
    with pytest.raises(ZeroDivisionError):
        next(values)

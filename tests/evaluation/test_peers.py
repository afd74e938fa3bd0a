"""The race against other engines: the cap is real, the cache is cold, the best of each counts. (Runs need minutes.)"""

import os
import subprocess
import sys

import pytest

from moe_jax.errors import UserError
from moe_jax.evaluation.peers import cgroup, race, report
from moe_jax.evaluation.peers.race import OURS, Contender, Result
from moe_jax.evaluation.peers.run import Run

MB = 10**6
HOG = "import sys; held = bytearray(int(sys.argv[1])); held[::4096] = b'x' * len(held[::4096]); print(len(held))"


@pytest.fixture
def cap():
    try:
        made = cgroup.MemoryCap(100 * MB)
    except UserError as error:
        assert "memory control group" in str(error)  # refused, not faked
        pytest.skip("no memory control group can be made here")
    with made:
        yield made


def test_the_cap_holds(cap):
    run = lambda nbytes: cap.run([sys.executable, "-c", HOG, str(nbytes)], dict(os.environ), 60)
    assert run(20 * MB).stdout == f"{20 * MB}\n"
    assert 20 * MB < cap.peak_bytes() < 100 * MB
    assert run(200 * MB).returncode in (-9, 137)


def test_a_cold_page_cache(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(4 * MB))
    file.read_bytes()
    assert cgroup.cached_bytes(file) > 3 * MB
    if subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True).strip() == "tmpfs":
        pytest.skip("this file system lives in the page cache")
    cgroup.drop_from_page_cache([tmp_path])
    assert cgroup.cached_bytes(file) < 0.05 * MB


def test_formats_are_made_in_a_process_of_their_own():
    assert race._apart(os.getpid) not in (os.getpid(), race._apart(os.getpid))  # pyright: ignore[reportArgumentType]


def result(engine, setting, tpot, same=4, capped=True, failure=""):
    runs = [] if failure else [Run([1, 2, 3, 4], tpot, 1.0)]
    return Result(Contender(engine, setting, {}, (), capped), runs, same, failure=failure)


def test_the_best_setting_counts():
    found = report.document(
        [
            result(OURS, "resident", 0.01, capped=False),
            result(OURS, "wrong", 0.05, same=3),  # ours must give the same text, or it does not count
            result(OURS, "right", 0.1),
            result("llama.cpp", "slow", 3.0),
            result("llama.cpp", "fast", 1.2, same=0),  # theirs counts even so
            result("accelerate", "large", 0.0, failure="killed: out of memory"),
        ],
        40,
        100,
    )
    assert found["fastest"][OURS]["setting"] == "right"
    assert found["fastest"]["llama.cpp"] == {"setting": "fast", "tpot_s": 1.2, "ratio": pytest.approx(12)}
    assert "accelerate" not in found["fastest"]
    table = report.text(found)
    assert "12.0 times as long" in table and "killed: out of memory" in table and "0/4" in table

"""benchmark.py as a user meets it: tables, JSON, plot, one-line errors."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.analysis import budget_plot
from moe_jax.errors import UserError
from moe_jax.evaluation import modes
from tests.tiny import TINY, write_tiny

ROOT = Path(__file__).parent.parent
BOUNDS = {
    *("compute_s", "transfer_s", "bound_overlap_s", "bound_serial_s", "machine_s", "machine_overlap_share"),
    *("reader_depth", "reader_bytes_per_s", "lru_loads_per_token", "belady_loads_per_token", "every_expert_resident"),
    "loads_per_token_seeing",
}
ROW = {
    *("name", "predictor", "policy", "horizon", "experts", "upcast", "tpot_s", "tpot_by_turn_s", "ttft_s", "recall"),
    *("predictor_s_per_token", "device_budget_bytes", "peak_device_cache_bytes", "loads_per_token", "loads_to_belady"),
    *("needed", "hit_rate", "ready_recall", "bytes_per_token", "stall_s_per_token", "ratio_to_lru", "overlap_share"),
    *("overlap_of_machine", "wasted_of_idle"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # No eos: random weights would end a text at once.
    return write_tiny(tmp_path_factory.mktemp("model"), dataclasses.replace(TINY, eos_ids=()))


def benchmark(*flags) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmark.py"), f"--config={ROOT}/configs/mixtral.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_tables_json_and_plot(checkpoint, tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "plot"
    done = benchmark(
        f"--config.checkpoint={checkpoint}",
        "--modes=resident,lru,repeat,no_cache,paper,oracle,lru@arrival",
        "--budgets=25%,50%",
        "--batches=2",
        "--prompt_lengths=8",
        "--max_new_tokens=5",
        "--repeats=2",
        "--config.offload.link_gbps=0.05",
        f"--output_json={out}",
        f"--plot={plot}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("*simulated* link of 0.05 GB/s") == 2
    named = "resident, lru, repeat, no_cache, paper, oracle, lru@arrival"
    said = "rehearsing 2 requests of 2 prompts: 2 of 2", "warming up: 8 of 8", f"2 turns of {named} at 25%: 16 of 16"
    assert all(line in done.stderr.splitlines() for line in said), done.stderr
    document = json.loads(out.read_text())
    assert document["simulated_link_gbps"] == 0.05
    runs = document["runs"]
    assert [(run["batch"], run["budget"]) for run in runs] == [(2, "25%"), (2, "50%")]
    assert [len(run["modes"]) for run in runs] == [7, 5]  # a mode with a budget of its own runs at the first
    for run in runs:
        bounds = run["bounds"]
        assert bounds.keys() == BOUNDS
        assert 0 < bounds["belady_loads_per_token"] <= bounds["lru_loads_per_token"]
        assert bounds["loads_per_token_seeing"]["16"] == bounds["belady_loads_per_token"]  # more than there are
        assert bounds["bound_serial_s"] == pytest.approx(bounds["compute_s"] + bounds["transfer_s"])
        assert bounds["machine_s"] > 0
        assert bounds["reader_bytes_per_s"] < 0.05e9
        rows = {row["name"]: row for row in run["modes"]}
        assert rows["oracle"]["recall"] in (1, None)  # none where predicting did not pay
        assert rows["lru@arrival"]["bytes_per_token"]["demand"] > 0
        assert all(row.keys() == ROW for row in rows.values())
        assert rows["lru"]["ratio_to_lru"] == {"value": 1, "low": 1, "high": 1}
        for row in (rows["lru"], rows["repeat"]):
            moved = sum(row["bytes_per_token"].values())
            whole = row["loads_per_token"] * run["expert_bytes"]
            assert 0.8 * whole < moved < 1.0001 * whole  # some may be given up half way
        assert rows["resident"]["loads_to_belady"] is None
        for name in ("lru", "repeat"):
            assert rows[name]["loads_to_belady"] > 0.5  # a prefill may load ahead, outside of what is counted
            assert rows[name]["peak_device_cache_bytes"] <= rows[name]["device_budget_bytes"] == run["budget_bytes"]
            assert sum(rows[name]["needed"].values()) == pytest.approx(1)
    assert runs[0]["modes"][4]["device_budget_bytes"] == 4 * runs[0]["expert_bytes"]  # paper: two layers' experts
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "SIMULATED LINK" in drawn and "perfect overlap" in drawn
    (tmp_path / "full.svg").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"full.svg cannot be written \(No space left on device\); free some space"):
        budget_plot.draw([document], tmp_path / "full")


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--modes=lru,lurned"], ["unknown mode 'lurned'", "did you mean learned?"]),
        (["--batches=1,x"], ["--batches=1,x", "positive"]),
        (["--prompt=ab", "--prompt_lengths=30"], ["no prompt has 30 tokens"]),
        (["--config.offload.tier=none"], ["--config.offload.tier=host"]),
        (["--peers", "--inflate=8", "--temperature=1"], ["--peers compares", "leave --temperature at 0"]),
        (["--temperature=-1"], ["--temperature must be 0 (greedy) or above"]),
    ],
)
def test_mistakes(checkpoint, flags, parts):
    done = benchmark(f"--config.checkpoint={checkpoint}", "--modes=lru", *flags)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("benchmark.py: error:") and all(part in last for part in parts), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--budgets=0.1%", "--budgets=0.1% is too small: the smallest is --budgets=min, 2 experts"),
        ("--budgets=auto", "--budgets=auto differs from run to run"),
        ("--config.offload.host_budget=auto", "host_budget=auto differs from run to run"),
        ("--config.offload.device_budget=1B", "--config.offload.device_budget=1B is too small"),
        ("--modes=lru,learned+lfu", "--modes: learned+lfu needs a predictor trained for this model"),
        ("--modes=lru,lru@arrival --budgets=min", "--modes: lru@arrival needs a budget of 18432B"),
        ("--modes=no_cache --config.offload.budget_scope=layer --budgets=min", "--modes: no_cache has a budget of 2"),
        ("--config.execution=speculative --config.prefetch.predictor=router", "python evaluate.py --modes=speculative"),
        ("--config.execution=cache_aware", "python evaluate.py --modes=cache_aware"),
        ("--peers --plot=plot", "leave out --plot"),
        ("--peers --batches=2", "leave out --batches"),
        ("--inflate=48 --modes=lru,lurned", "unknown mode 'lurned'"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_read(checkpoint, flags, message):
    done = benchmark(f"--config.checkpoint={checkpoint}", "--modes=lru", *flags.split())
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("benchmark.py: error: ") and message in line


def test_the_defaults_finish_on_a_model_without_a_predictor(checkpoint, tmp_path):
    short = ("--max_new_tokens=3", "--repeats=2", f"--output_json={tmp_path}/out.json")
    done = benchmark(f"--config.checkpoint={checkpoint}", "--config.offload.device_budget=auto", *short)
    assert done.returncode == 0, done.stderr
    left_out, budget = done.stderr.splitlines()[:2]
    assert left_out.startswith("modes: resident, lru, repeat, router; for learned train_predictor.py")
    assert budget == "budgets: 25%, as auto differs from run to run; for others --budgets"
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert (run["budget"], [row["name"] for row in run["modes"]]) == ("25%", ["resident", "lru", "repeat", "router"])


def test_modes_by_name():
    parse = lambda *names, trained=True: modes.parse(
        names, ("none", "router", "default_vector"), ("lru", "lfu"), ("stage", "arrival"), 2, trained
    )
    assert parse("router+lfu", "lfu") == [modes.Mode("router+lfu", "router", "lfu"), modes.Mode("lfu", "none", "lfu")]
    assert parse("router+lfu@arrival")[0] == modes.Mode("router+lfu@arrival", "router", "lfu", upcast="arrival")
    assert parse("paper") == [modes.Mode("paper", "default_vector", "lru", horizon=1, experts=4)]
    assert parse("paper", trained=False)[0].predictor == "router"
    for names in ((), ("lru", "lru"), ("none",), ("router+",), ("router+mru",), ("resident+lru",), ("lru@x",)):
        with pytest.raises(UserError):
            parse(*names)

"""infer.py as a user meets it: text, table, JSON, one-line errors, Ctrl-C."""

import dataclasses
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.hf import HFCheckpoint
from tests.tiny import TINY, write_tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # No eos: random weights would end a text at once.
    return write_tiny(tmp_path_factory.mktemp("model"), dataclasses.replace(TINY, eos_ids=()))


def command(*flags) -> list[str]:
    return [sys.executable, str(ROOT / "infer.py"), f"--config={ROOT}/configs/mixtral.py", *map(str, flags)]


def infer(*flags, stdin="") -> subprocess.CompletedProcess:
    return subprocess.run(command(*flags), input=stdin, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_text_table_and_json(checkpoint, tmp_path):
    out, trace = tmp_path / "out.json", tmp_path / "trace.jsonl"
    done = infer(
        f"--config.checkpoint={checkpoint}",
        "--prompt=abc",
        "--prompt=second prompt",
        "--max_new_tokens=12",
        "--config.prefetch.predictor=repeat",
        "--config.offload.device_budget=50%",
        f"--output_json={out}",
        f"--trace={trace}",
    )
    assert done.returncode == 0, done.stderr
    assert "hit rate" in done.stdout and "bound" in done.stdout
    document = json.loads(out.read_text())
    assert [len(output["token_ids"]) for output in document["outputs"]] == [12, 12]
    assert [output["prompt"] for output in document["outputs"]] == ["abc", "second prompt"]
    metrics = document["metrics"]
    assert sum(metrics["needed"].values()) == pytest.approx(1)
    assert metrics["hit_rate"] == pytest.approx(metrics["needed"]["cached"] + metrics["needed"]["prefetched"])
    assert metrics["peak_device_cache_bytes"] <= metrics["device_budget_bytes"]
    assert metrics["bound_serial_s"] >= metrics["bound_overlap_s"] > 0
    assert metrics["tpot_s"]["p90"] >= metrics["tpot_s"]["median"] > 0
    assert document["config"]["prefetch"]["predictor"] == "repeat"
    assert trace.read_text().startswith('{"kind": "trace"')
    resident = tmp_path / "resident.json"
    done = infer(
        f"--config.checkpoint={checkpoint}",
        "--prompt=abc",
        "--prompt=second prompt",
        "--max_new_tokens=12",
        "--config.offload.tier=none",
        f"--output_json={resident}",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(resident.read_text())["outputs"] == document["outputs"]
    assert json.loads(resident.read_text())["metrics"]["hit_rate"] is None


def test_standard_input_and_sampling_seed(checkpoint):
    flags = (f"--config.checkpoint={checkpoint}", "--max_new_tokens=20", "--temperature=1.5", "--top_k=50")
    texts = [infer(*flags, f"--seed={seed}", stdin="from a pipe").stdout.split("\n\n")[1] for seed in (1, 1, 2)]
    assert texts[0].startswith("from a pipe")
    assert texts[0] == texts[1] != texts[2]


def test_a_full_disk_is_one_line_after_the_text(checkpoint):
    done = infer(f"--config.checkpoint={checkpoint}", "--prompt=abc", "--max_new_tokens=4", "--output_json=/dev/full")
    [line] = [line for line in done.stderr.splitlines() if not line.endswith("...")]  # progress
    assert done.returncode == 2 and "hit rate" in done.stdout
    assert "error: /dev/full cannot be written (No space left on device); free some space and give the same" in line


def broken(checkpoint: Path, target: Path, change) -> Path:
    """A copy of the checkpoint whose tensors went through `change`."""
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((checkpoint / name).read_bytes())
    save_file(change(load_file(checkpoint / "model.safetensors")), target / "model.safetensors")
    return target


MISTAKES = {
    "unknown flag": (["--promt=x"], "--prompt"),
    "unknown config field": (["--config.offload.device_budgte=25%"], "device_budget"),
    "misspelt enum": (["--config.prefetch.predictor=routr"], "router"),
    "wrong type": (["--config.batch_size=many"], "batch_size"),
    "no directory": (["--config.checkpoint=/nowhere/at/all"], "/nowhere/at/all"),
    "no config.json": (["--config.checkpoint={empty}"], "config.json"),
    "missing tensor": (["--config.checkpoint={missing}"], "model.norm.weight"),
    "extra tensor": (["--config.checkpoint={extra}"], "model.surplus.weight"),
    "truncated tensor": (["--config.checkpoint={truncated}"], "truncated"),
    "long prompt": (["--config.checkpoint={good}", "--prompt=" + "x" * 300], "context of 256"),
    "small budget": (["--config.checkpoint={good}", "--config.offload.device_budget=1KiB"], "smallest"),
    "no such prompt file": (["--config.checkpoint={good}", "--prompt_file=/nowhere.txt"], "/nowhere.txt"),
    "bad output folder": (["--config.checkpoint={good}", "--output_json=/no/such/folder/x.json"], "/no/such/folder"),
    "a folder as trace": (["--config.checkpoint={good}", "--trace=/tmp"], "is a folder"),
    "disk tier of a Hugging Face directory": (
        ["--config.checkpoint={good}", "--config.offload.tier=disk"],
        "python convert.py --checkpoint={good}",
    ),
    "belady without a future": (
        ["--config.checkpoint={good}", "--config.offload.policy=belady"],
        "--config.offload.trace",
    ),
    "bad sampling": (["--config.checkpoint={good}", "--top_p=1.5"], "--top_p"),
}


@pytest.fixture(scope="module")
def places(checkpoint, tmp_path_factory):
    base = tmp_path_factory.mktemp("broken")
    (base / "empty").mkdir()
    truncated = broken(checkpoint, base / "truncated", lambda tensors: tensors)
    with (truncated / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 100)
    without = lambda tensors: {name: t for name, t in tensors.items() if name != "model.norm.weight"}
    surplus = lambda tensors: {**tensors, "model.surplus.weight": tensors["model.norm.weight"]}
    return {
        "good": checkpoint,
        "empty": base / "empty",
        "truncated": truncated,
        "missing": broken(checkpoint, base / "missing", without),
        "extra": broken(checkpoint, base / "extra", surplus),
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(places, mistake):
    flags, named = MISTAKES[mistake]
    done = infer(*(flag.format(**places) for flag in flags))
    lines = [line for line in done.stderr.splitlines() if not line.endswith("...")]  # progress
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("infer.py: error: ") and named.format(**places) in lines[0], (
        done.stderr
    )


EARLY = {
    "no tokens": (["--prompt=x", "--max_new_tokens=0"], "flag --max_new_tokens=0: 0 is not a positive integer"),
    "a long seed": (["--prompt=x", f"--seed={2**63}"], f"flag --seed={2**63}: {2**63} is not an integer in the range"),
    "empty prompt": (["--prompt=x", "--prompt="], "the prompt is empty; write some text after --prompt="),
    "empty file": (["--prompt_file=/dev/null"], "--prompt_file=/dev/null is empty; write the prompt into it"),
    "prompt of bytes": (["--prompt=caf\udce9"], "--prompt is not UTF-8 text"),
    "system of bytes": (["--prompt=x", "--chat", "--system=caf\udce9"], "--system is not UTF-8 text"),
    "one file twice": (
        ["--prompt=x", "--report={good}/y", "--trace={good}/../{good.name}/x", "--output_json={good}/x"],
        "--output_json and --trace are both {good}/../{good.name}/x; give each a file of its own",
    ),
}


@pytest.mark.parametrize("mistake", EARLY)
def test_a_mistake_that_needs_no_model_is_said_before_it_is_loaded(places, mistake):
    flags, message = EARLY[mistake]
    done = infer(*(flag.format(**places) for flag in flags))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("infer.py: error: " + message.format(**places)), done.stderr
    assert done.stderr.count("\n") == 1


def test_standard_input_that_is_no_text_is_one_line():
    done = subprocess.run(command(), input=b"caf\xe9", capture_output=True, timeout=300, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"infer.py: error: standard input cannot be read as UTF-8 text ('utf-8' codec can't")


def test_who_waits_for_standard_input_says_so():
    flags, pipe = command("--config.checkpoint=/nowhere"), subprocess.PIPE
    with subprocess.Popen(flags, stdin=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        said = "reading the prompt from standard input (end it with Ctrl-D) ...\n"
        assert select.select([process.stderr], [], [], 60)[0], "it waits and says nothing"
        assert process.stderr.readline() == said
        assert "/nowhere does not exist" in process.communicate("a prompt", timeout=300)[1]


@pytest.mark.parametrize("without", ["<&-", "0>/dev/null"])
def test_no_standard_input_is_no_prompt(checkpoint, without):
    """Closed, or not to be read, as `nohup` leaves it."""
    flags = command(f"--config.checkpoint={checkpoint}", "--max_new_tokens=2")
    done = subprocess.run(["bash", "-c", f'"$@" {without}', "bash", *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "No prompt given" in done.stdout and "standard input" not in done.stderr


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "bank"
    convert(HFCheckpoint(checkpoint), directory)
    return directory


def disturbed(disturb, out: Path, *flags: str) -> tuple[int, str]:
    """A run of 240 tokens on which `disturb(process)` falls once some text has come: exit code and what it printed."""
    slow = "--config.offload.link_gbps=0.0005"  # every expert takes 18 ms, so that the run lasts
    tokens = ("--prompt=go on", "--max_new_tokens=240", f"--output_json={out}")
    with subprocess.Popen(
        command(*flags, *tokens, slow, "--config.offload.device_budget=6%"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        printed = ""
        while len(printed.partition("go on")[2]) < 8 and process.poll() is None:  # some text has come
            printed += process.stdout.read(1)
        disturb(process)
        printed += process.communicate(timeout=60)[0]
    assert "Traceback" not in printed, printed
    return process.returncode, printed


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_ctrl_c_prints_what_there_is(checkpoint, converted, tmp_path, tier):
    out = tmp_path / "out.json"
    directory = checkpoint if tier == "host" else converted
    flags = (f"--config.checkpoint={directory}", f"--config.offload.tier={tier}")
    code, printed = disturbed(lambda process: process.send_signal(signal.SIGINT), out, *flags)
    assert code == 130 and "interrupted" in printed and "hit rate" in printed
    document = json.loads(out.read_text())
    assert 0 < len(document["outputs"][0]["token_ids"]) < 240
    assert document["metrics"]["needed"]["missed"] is not None


def test_a_bank_file_that_is_truncated_underneath_ends_the_run_with_one_line(converted, tmp_path):
    directory, out = shutil.copytree(converted, tmp_path / "bank"), tmp_path / "out.json"
    file = sorted(directory.glob("experts-*"))[2]
    flags = (f"--config.checkpoint={directory}", "--config.offload.tier=disk")
    code, printed = disturbed(lambda process: os.truncate(file, 4096), out, *flags)
    [line] = [line for line in printed.splitlines() if "error:" in line]
    assert code == 1 and re.search(rf"error: loading layer 2 expert \d failed: {file} was truncated", line), printed
    assert "hit rate" in printed  # and what had come by then is kept
    document = json.loads(out.read_text())
    [output] = document["outputs"]
    assert 0 < len(output["token_ids"]) < 240 and output["prompt"] + output["text"] in printed


def test_the_disk_tier_writes_what_the_resident_model_writes(converted, tmp_path):
    texts = []
    for flags in (["--config.offload.tier=none"], ["--config.offload.tier=disk", "--config.offload.policy=predicted"]):
        out = tmp_path / "out.json"
        done = infer(
            f"--config.checkpoint={converted}", "--prompt=abc", "--max_new_tokens=24", f"--output_json={out}", *flags
        )
        assert done.returncode == 0, done.stderr
        texts.append(json.loads(out.read_text())["outputs"])
    assert texts[0] == texts[1]

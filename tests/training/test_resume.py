"""train_lm.py killed with SIGKILL at a random moment, or stopped by a full disk, resumes to the same weights."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open

from moe_jax.training import corpus
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


def train(data: Path, output: Path) -> subprocess.Popen:
    overrides = {
        "data": data,
        "output": output,
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
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, str(ROOT / "train_lm.py"), f"--config={ROOT}/configs/tiny_lm.py", *flags]
    return subprocess.Popen([*command, f"--export={output}/model"], cwd=ROOT, stderr=subprocess.PIPE, text=True)


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

"""train_predictor.py from end to end on a tiny model: killed with SIGKILL it resumes and ends with the same weights."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import moe_jax
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model, text to train on and a test text."""
    place = tmp_path_factory.mktemp("predictor")
    write_tiny(place / "model")
    text = (ROOT / "moe_jax" / "prediction" / "fit.py").read_text()
    (place / "text").mkdir()
    for part in range(4):
        (place / "text" / f"{part}.py").write_text(text[part * 1500 : (part + 1) * 1500])
    (place / "test.txt").write_text(
        "A text of its own, of which there is no line in the other one, not even in part.\n" * 8
    )
    (place / "validation.txt").write_text(
        "What is chosen on is another text than what is tested on, word by word.\n" * 9
    )
    return place


def command(place: Path, output: str, *more: str) -> list[str]:
    overrides = {
        "checkpoint": place / "model",
        "output": place / output,
        "horizon": 3,
        "window": 32,
        "max_tokens": 5000,
        "fit.tokens": 40,
        "fit.expert_hidden": 2,
        "fit.steps": STEPS,
        "fit.batch_windows": 4,
        "fit.evaluate_every": 10,
        "fit.checkpoint_every": 5,
        "fit.patience": 100,
    }
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    script = [sys.executable, str(ROOT / "train_predictor.py"), f"--config={ROOT}/configs/predictor.py"]
    texts = [f"--text={place}/text", f"--validation_text={place}/validation.txt", f"--test_text={place}/test.txt"]
    return [*script, *flags, *texts, *more]


def run(*args, disk: str = "unlimited") -> subprocess.CompletedProcess:
    """`disk` is what it takes of a file, in KiB."""
    shell = ["bash", "-c", f'ulimit -S -f {disk}; exec "$@"', "bash"]
    return subprocess.run([*shell, *command(*args)], cwd=ROOT, capture_output=True, text=True, timeout=500)


def weights(directory: Path) -> dict[str, bytes]:
    """Every array of a saved predictor. (Files that orbax writes carry times and random names.)"""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((directory / "predictor" / "weights").absolute())
    return {str(path): np.asarray(value).tobytes() for path, value in jax.tree_util.tree_leaves_with_path(tree)}


def reached(output: Path) -> int:
    """Shards logged, and 100 more for every fitted step that a checkpoint holds."""
    steps = [int(p.name) for p in (output / "fit" / "checkpoints").glob("*") if p.name.isdigit()]
    return len(list((output / "log").glob("*/shard_*"))) + 100 * max(steps, default=0)


def test_a_killed_run_ends_like_an_uninterrupted_one(place):
    whole = run(place, "whole", f"--output_json={place}/scores.json")
    assert whole.returncode == 0, whole.stderr
    scores = json.loads((place / "scores.json").read_text())
    assert all(
        said in whole.stdout for said in ("recall@2 on the test texts", "next token", "calibration error", "Brier")
    )
    predictors = {"learned", "best_per_layer", "router", "default_vector", "repeat", "frequency", "random"}
    assert set(scores["scores"]) == predictors
    curve = [json.loads(line) for line in (place / "whole" / "scalars" / "scalars.jsonl").read_text().splitlines()]
    assert [x["step"] for x in curve if "loss" in x] == list(range(1, STEPS + 1))
    assert [x["step"] for x in curve if "validation_recall" in x] == list(range(0, STEPS + 1, 10))
    assert 3000 < scores["train_tokens"] <= 5000
    later_use = scores["later_use_nats_per_expert"]
    assert 0 < later_use["network"] < later_use["averages"]
    assert f"later use of an expert: {later_use['network']:.4f} nats" in whole.stdout
    assert "log: " in whole.stderr and " GB free in " in whole.stderr
    steps = "loading the model", "cutting train text", "40 of 40", "least squares", "choosing", "calibrating", "7 of 7"
    assert all(step in whole.stderr for step in steps)  # nothing that takes minutes goes unsaid
    again = run(place, "scored", f"--score={place}/whole/predictor", f"--output_json={place}/again.json")
    assert again.returncode == 0, again.stderr
    assert json.loads((place / "again.json").read_text())["scores"] == scores["scores"]
    assert again.stdout in whole.stdout and not (place / "scored" / "fit").exists()
    fitted = place / "whole" / "predictor" / "calibration.json"
    before = fitted.read_text()
    fitted.unlink()
    assert run(place, "scored", f"--calibrate={place}/whole/predictor").returncode == 0
    assert fitted.read_text() == before
    target = random.choice([1, 2, 500, 2000])  # while logging, and while fitting
    killed = subprocess.Popen(command(place, "killed"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while reached(place / "killed") < target and killed.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (place / "killed" / "predictor" / "predictor.json").exists()
    resumed = run(place, "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert weights(place / "killed") == weights(place / "whole")
    later_use = [place / run / "predictor" / "usage.safetensors" for run in ("whole", "killed")]
    assert later_use[0].read_bytes() == later_use[1].read_bytes()


def test_in_bfloat16_from_a_full_disk_to_a_predictor_that_the_engine_takes(place):
    """The log, which a disk first does not take, and the fit; and then the model, in the same dtype."""
    bfloat16 = ["--config.dtype=bfloat16", "--config.fit.dtype=bfloat16"]
    full = run(place, "half", *bfloat16, disk="500")
    assert full.returncode == 2 and "Traceback" not in full.stderr
    said = full.stderr.splitlines()[-1]
    assert "train/shard_00000.partial/residual.npy: the log cannot be written there (File too large)" in said
    done = run(place, "half", *bfloat16)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place / "half" / "fit")
    full = run(place, "half", *bfloat16, disk="20")
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "fit/checkpoints cannot be written (File too large); free some space" in full.stderr.splitlines()[-1]
    other = run(place, "half", "--config.fit.dtype=bfloat16")
    assert other.returncode == 2 and "of a model in another dtype" in other.stderr.splitlines()[-1]
    other = run(place, "half", "--config.dtype=bfloat16")
    assert other.returncode == 2 and "holds a fit of other settings" in other.stderr.splitlines()[-1]
    trained = {"predictor": "learned", "checkpoint": str(place / "half" / "predictor"), "horizon": 3}
    model = moe_jax.load(checkpoint=str(place / "model"), dtype="bfloat16", prefetch=trained)
    source: Any = model.engine.source
    assert model.usage is not None and source._loader._outlook._history._expect is model.usage
    generation = model.start(["def fit("], 8)
    assert all(piece is not None for _, piece in generation)
    assert model.metrics(generation)["recall"] is not None
    model.close()


DRIVER = """
import runpy, sys
from moe_jax import config
config.PREDICTORS["mine"] = "moe_jax.prediction.memory:Repeat"
runpy.run_path("train_predictor.py", run_name="__main__")
"""


def test_texts_to_score_on_are_bounded_and_a_registered_predictor_is_in_the_tables(place):
    """`mine` is another name of `repeat`, on at most 100 tokens."""
    more = ["--config.max_scored_tokens=100", f"--output_json={place}/bounded.json"]
    script, *flags = command(place, "bounded", f"--score={place}/whole/predictor", *more)[1:]
    done = subprocess.run([sys.executable, "-c", DRIVER, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "bounded.json").read_text())
    assert 60 < found["test_tokens"] <= 100
    assert list(found["scores"])[-1] == "mine" and found["scores"]["mine"] == found["scores"]["repeat"]


def test_losses_are_compared_from_one_closed_form(place):
    few = ["--config.horizon=1", "--config.fit.steps=2", "--config.max_tokens=500", "--config.fit.evaluate_every=1"]
    losses = ["--ablate=kl", "--ablate=ranking+membership"]
    done = run(place, "ablated", *few, *losses, f"--output_json={place}/ablation.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unknowns of a layer") == 1 and "; raise --config.max_tokens, or" in done.stderr
    found = json.loads((place / "ablation.json").read_text())["losses"]
    assert [fit["loss"] for fit in found] == ["closed form", "kl", "ranking+membership"]
    best = max(found, key=lambda fit: fit["recall"])
    assert f"all layers and horizons: {best['loss']}, {100 * best['recall']:.2f}%" in done.stdout
    curves = [
        place / "ablated" / "ablation" / name / "scalars" / "scalars.jsonl" for name in ("kl", "ranking+membership")
    ]
    kl, other = ([json.loads(line) for line in file.read_text().splitlines()] for file in curves)
    assert kl[0]["validation_recall"] == other[0]["validation_recall"]  # one start, of which each says something else
    assert kl[0]["validation_loss"] != other[0]["validation_loss"] and kl[-1] != other[-1]
    assert not (place / "ablated" / "predictor").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=nowhere"], "text nowhere does not exist"),
        (["--validation_text=nowhere.txt"], "text nowhere.txt does not exist"),
        ([f"--config.output={ROOT}/README.md"], "README.md: no folder can be made there"),
        (["--config.window=999"], "config.window=999 must be from 2 to 255"),
        (["--config.horizon=0"], "config.horizon must be at least 1, not 0"),
        (["--config.fit.steps=-1"], "config.fit.steps must be at least 0"),
        (["--score=nowhere"], "nowhere holds no trained predictor"),
        (["--ablate=kl", "--score=shipped"], "give one of them"),
        (["--config.max_tokens=0"], "config.max_tokens must be at least 1"),
        (["--config.max_scored_tokens=0"], "config.max_scored_tokens must be at least 1"),
        (["--config.seed=-1"], "config.seed must be from 0 to 4294967295, not -1"),
        (["--config.dtype=float16"], "config.dtype='float16' is not one of float32, bfloat16"),
        (["--config.fit.dtype=half"], "config.fit.dtype='half' is not one of float32, bfloat16"),
        ([f"--output_json={ROOT}"], f"--output_json={ROOT} is a folder; name a file"),
        (["--output_json=/nowhere/a.json"], "--output_json=/nowhere/a.json: its folder does not exist"),
        (["--output_json=/proc/a.json"], "--output_json=/proc/a.json cannot be written"),
        (["--config.output=/proc/sys"], "config.output=/proc/sys cannot be written"),
    ],
)
def test_mistakes_are_one_line(place, flags, message):
    result = run(place, "mistaken", *flags)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (
            ["text"],
            "--text without --validation_text and --test_text: the shipped English and Python texts choose and test",
        ),
        (["text", "test_text"], "--text without --validation_text: the shipped English and Python texts choose the"),
        (["text", "validation_text"], "--text without --test_text: the shipped English and Python texts test the"),
        (["text", "validation_text", "test_text"], None),
        ([], None),
    ],
)
def test_shipped_texts_that_judge_a_predictor_of_other_text_are_named(place, tmp_path, texts, said):
    """Read from the first lines: training ends at a folder that is another run's."""
    names = {"text": "text", "validation_text": "validation.txt", "test_text": "test.txt"}
    (tmp_path / "log" / "train").mkdir(parents=True)
    (tmp_path / "log" / "train" / "manifest.json").write_text("{}")
    flags = [f"--config.checkpoint={place}/model", f"--config.output={tmp_path}", "--config.window=32"]
    flags += ["--config.max_tokens=500", *(f"--{name}={place / names[name]}" for name in texts)]
    script = [sys.executable, str(ROOT / "train_predictor.py"), f"--config={ROOT}/configs/predictor.py"]
    done = subprocess.run([*script, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "activation log of another version" in done.stderr.splitlines()[-1]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == bool(said) and all(said in line and line.endswith("; give your own") for line in warnings)


def test_another_scripts_config_is_refused_in_one_line():
    script = [sys.executable, str(ROOT / "train_predictor.py"), f"--config={ROOT}/configs/mixtral.py"]
    result = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "the config lacks device_budget, fit, " in result.stderr.splitlines()[-1]

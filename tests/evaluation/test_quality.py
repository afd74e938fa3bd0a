"""Quality read through decode steps, against the slow reference; agreement of texts; the script as a user meets it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_jax.analysis import pareto
from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.evaluation import quality
from moe_jax.inference.session import Model
from tests import reference
from tests.tiny import TINY, write_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"), dataclasses.replace(TINY, eos_ids=()))


@pytest.fixture(scope="module")
def model(directory):
    values = {"checkpoint": str(directory), "prefetch": {"predictor": "none", "horizon": 2}}
    model = Model(Config.from_dict(values | {"offload": {"device_budget": "50%"}}))
    yield model
    model.close()


def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(3, TINY.vocab_size, (3, 9)).astype(np.int32)


def test_quality_is_that_of_the_reference(model, directory):
    exact, gated = quality.ways(model, ["speculative_gated"], ["router"], rows=2)
    of_exact, of_gated = quality.read([exact, gated], windows(), rows=2)  # the second batch is half empty
    weights, nats = reference.read(directory), []
    for window in windows().tolist():
        logits, _ = reference.forward(model.checkpoint.architecture, weights, window)
        normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats += [-normalised[t, window[t + 1]] for t in range(1, len(window) - 1)]
    assert of_exact.tokens == len(nats) == 21
    assert of_exact.perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    assert (of_exact.perplexity_ratio, of_exact.same_choice, of_exact.departed) == (1, 1, None)
    assert of_exact.kl == pytest.approx(0, abs=1e-6)
    assert of_gated.perplexity_ratio == pytest.approx(of_gated.perplexity / of_exact.perplexity)
    assert of_gated.departed is not None and of_gated.kl > 0 and 0 < of_gated.departed < 1 and of_gated.same_choice < 1


def test_recall_by_layer_counts_what_was_planned(model):
    found = quality.recall_by_layer(model, "router", windows(), rows=2)
    router = [r for r in found if r is not None and 0 < r < 1]
    assert len(router) == len(found)
    assert quality.recall_by_layer(model, "repeat", windows(), rows=2)[0] is None  # silent before layer 0
    gated = quality.ways(model, ["speculative_gated"], ["router"], rows=2)[1]
    # A layer departs where not all K are right: as often as some are missing, at least.
    departed = quality.read([gated], windows(), rows=2)[0].departed
    assert departed is not None and departed > 1 - np.mean(router) - 0.15  # a departed run sees other tokens


def test_generations_take_turns_and_are_compared_with_exact(model):
    chosen = quality.ways(model, ["speculative"], ["none", "router"], rows=2)
    assert [(way.mode, way.predictor) for way in chosen] == [
        ("exact", "none"),
        ("exact", "router"),
        ("speculative", "router"),
    ]
    found = quality.generate(model, chosen, ["abc", "second"], 8)
    assert [speed.agreement for speed in found[:2]] == [8, 8] and found[2].agreement < 8
    for way, speed in zip(chosen, found, strict=True):
        assert len(way.step_s) == 2 * 7 and way.trace.summary()["tokens"] == 2 * 7
        if way.predictor == "none":  # what is waited for is then exactly what is demanded
            assert speed.waited_bytes == pytest.approx(speed.demand_bytes) and speed.speculative_bytes == 0


def test_what_a_way_finds_does_not_depend_on_who_ran_before(model):
    """An earlier way had the same text: what it left in the store, and what the loader remembers, are no merit."""
    chosen = quality.ways(model, [], ["none", "router", "none", "router"], rows=1)
    assert [way.predictor for way in chosen] == ["none", "router"] * 2
    none, _, none_again, _ = quality.generate(model, chosen, ["abc", "second"], 8)  # of others time has a say
    assert none.waited_bytes == none_again.waited_bytes and none.hit_rate == none_again.hit_rate
    assert none.demand_bytes > 0


def test_windows_that_fill_a_batch_up_do_not_count(model):
    """The last of three windows alone makes the second batch."""
    for name in ("router", "repeat"):
        one, two = (quality.recall_by_layer(model, name, windows(), rows=rows) for rows in (1, 2))
        assert one == pytest.approx(two)
    gated = lambda rows: quality.ways(model, ["speculative_gated"], ["router"], rows=rows)[1]
    departed = [quality.read([gated(rows)], windows(), rows=rows)[0].departed for rows in (1, 2, 4)]
    assert departed[0] == pytest.approx(departed[1]) == pytest.approx(departed[2])


def test_only_what_was_generated_counts(model, tmp_path):
    """Of a model that ends its text, which greedy generation without eos shows where."""
    going_on = model.start(["abc"], 8)
    list(going_on)
    ids = going_on.outputs[0].token_ids
    ends = next(i for i in range(2, 8) if ids[i] not in ids[:i])
    directory = write_tiny(tmp_path, dataclasses.replace(TINY, eos_ids=(ids[ends],)))
    ending = Model(Config.from_dict({"checkpoint": str(directory), "prefetch": {"predictor": "none"}}))
    (exact,) = quality.generate(ending, quality.ways(ending, [], ["none"], rows=1), ["abc"], 8)
    ending.close()
    assert exact.agreement == exact.new_tokens == ends + 1


def test_weak_predictors_leave_the_others_apart_in_the_picture(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    ways = [
        {
            "mode": mode,
            "predictor": predictor,
            "speed": {"tpot_s": 0.01, "waited_bytes": 1e6},
            "quality": {"perplexity_ratio": ratio},
        }
        for mode, predictor, ratio in (
            ("exact", "none", 1.0),
            ("hybrid", "learned", 1.001),
            ("speculative", "learned", 1.01),
            ("speculative", "repeat", 80.0),
        )
    ]
    pareto.plot(ways, str(tmp_path / "plot"))
    axis = figures[0].axes[0]
    assert "logarithmic" in axis.get_ylabel()
    axis.autoscale_view()  # else the limits are those of no data until it is drawn
    heights = [axis.transAxes.inverted().transform(axis.transData.transform((10, y)))[1] for y in (0, 0.1, 1, 7900)]
    assert min(np.diff(heights)) > 0.05, heights
    monkeypatch.undo()
    (tmp_path / "full.svg").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"full.svg cannot be written \(No space left on device\); free some space"):
        pareto.plot(ways, str(tmp_path / "full"))


def test_the_pareto_front():
    assert pareto.pareto_front([(3, 0), (1, 5), (2, 6), (2, 1), (4, 0)]) == [(1, 5), (2, 1), (3, 0)]


def test_a_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'pip install "moe_jax\[plot\]"'):
        pareto.check()


def test_mistakes_are_said_before_anything_is_loaded(tmp_path):
    command = [sys.executable, str(ROOT / "evaluate.py"), f"--config={ROOT}/configs/mixtral.py"]
    (tmp_path / "plot.svg").mkdir()
    mistakes = {
        "--modes=": "--modes is empty; give some of exact, speculative",
        f"--output_json={tmp_path}": "is a folder; name a file in it",
        f"--plot={tmp_path}/no/plot": "its folder does not exist",
        f"--plot={tmp_path}/plot": "plot.svg is a folder",
        "--config.execution=hybrid": "--config.execution is what is compared here: name what to run with --modes",
        "--config.prefetch.predictor=router": "name what to run with --predictors",
        f"--measure_recall --output_json={tmp_path}/x": "stores with the predictor; leave out --output_json",
        "--measure_recall --modes=hybrid": "leave out --modes",
    }
    for flag, message in mistakes.items():
        done = subprocess.run([*command, *flag.split()], capture_output=True, text=True, timeout=100, cwd=ROOT)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and message in line


def test_recall_is_not_measured_where_it_cannot_be_stored(directory):
    """/proc is a folder in which nobody can make a file."""
    command = [sys.executable, str(ROOT / "evaluate.py"), "--measure_recall", "--predictors=router"]
    command += [f"--config.checkpoint={directory}", "--config.prefetch.checkpoint=/proc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 2 and "recall of router" not in done.stderr
    assert "--config.prefetch.checkpoint=/proc cannot be written" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_script(directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text, and some more of it; " * 4)
    flags = f"--text={text} --tokens=48 --window=32 --rows=2 --prompts=1"
    outputs = [f"--output_json={tmp_path}/out.json", f"--plot={tmp_path}/plot", "--new_tokens=4"]
    command = [sys.executable, str(ROOT / "evaluate.py"), f"--config={ROOT}/configs/mixtral.py", *flags.split()]
    command += [f"--config.checkpoint={directory}", "--config.offload.device_budget=50%", *outputs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "cache_aware" in done.stdout and "over exact" in done.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    # Neither a trained predictor nor measured recall is there for this model.
    assert "predictors: none, router" in done.stderr and "hybrid is left out for router" in done.stderr
    expected = [("exact", "none"), ("exact", "router"), ("speculative", "router"), ("speculative_gated", "router")]
    expected += [("cache_aware", "none"), ("cache_aware", "router")]
    assert [(way["mode"], way["predictor"]) for way in document["ways"]] == expected
    assert document["ways"][0]["quality"]["perplexity_ratio"] == 1
    assert (tmp_path / "plot.png").stat().st_size > 1000 and "<svg" in (tmp_path / "plot.svg").read_text()
    wrong = subprocess.run([*command, "--modes=fast"], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert wrong.returncode == 2 and "fast is not among exact" in wrong.stderr
    mistakes = {
        "--predictors=oracle": "not the oracle",
        "--predictors=none --modes=hybrid": "name a predictor",
        "--window=999 --tokens=999": "more than the 256 positions",
        f"--text={text}": "another text has this name",
        "--new_tokens=250": "more than the 256 positions leave after prompts of 48 tokens; give at most 209",
        "--prompts=2": "hold 1 of 48 tokens; give --prompts=1",
    }
    for flags, message in mistakes.items():
        wrong = subprocess.run([*command, *flags.split()], capture_output=True, text=True, timeout=100, cwd=ROOT)
        assert wrong.returncode == 2 and message in wrong.stderr.splitlines()[-1]

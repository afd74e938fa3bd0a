"""The predictor in CONTRIBUTING.md works as it is printed there."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import moe_jax
from moe_jax import config
from moe_jax.prediction import predictors
from tests.prediction.synthetic import SPEC, activations, parts
from tests.prediction.test_predictors import run
from tests.tiny import TINY, write_tiny

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def fading(monkeypatch, tmp_path):
    """One file, and one line."""
    code = re.findall(r"```python\n(.*?)```", TEXT, re.S)[0]
    (name, module, found) = re.findall(r'`"(\w+)": "moe_jax\.prediction\.(\w+):(\w+)",`', TEXT)[0]
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(config.PREDICTORS, name, f"{module}:{found}")
    return predictors.named(name)


def test_it_remembers_what_it_was_told(fading):
    arrays = activations(SPEC, parts(), 2, 6)
    p, state, executables = run(fading, arrays)
    assert executables == 1 and p.shape[-2:] == (SPEC.horizon, SPEC.num_experts)
    np.testing.assert_allclose(p.sum(-1), SPEC.top_k, rtol=1e-5)
    np.testing.assert_allclose(fading.prime(SPEC, arrays[2].swapaxes(0, 1)), state, rtol=1e-5)


def test_it_is_in_the_tables_of_recall(fading):
    assert list(predictors.compared())[-2:] == ["random", fading.name]
    assert not {"none", "oracle"} & set(predictors.compared())


def test_it_runs_in_the_engine_and_changes_no_text(fading, tmp_path):
    checkpoint = str(write_tiny(tmp_path, dataclasses.replace(TINY, eos_ids=())))
    texts, recalls = [], []
    for name in ("none", fading.name):
        model = moe_jax.load(checkpoint=checkpoint, prefetch={"predictor": name, "horizon": 3})
        generation = model.start(["abc"], 12)
        texts.append("".join(piece for _, piece in generation))
        recalls.append(model.metrics(generation)["recall"])
        model.close()
    assert texts[0] == texts[1]
    assert recalls[0] is None and recalls[1] is not None

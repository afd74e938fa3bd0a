"""The eviction policy in CONTRIBUTING.md works as it is printed there."""

import dataclasses
import re
from pathlib import Path

import pytest

import moe_jax
from moe_jax import config
from tests.tiny import TINY, write_tiny

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def farthest(monkeypatch, tmp_path):
    """One file, and one line; gives the class."""
    code = re.findall(r"```python\n(.*?)```", TEXT, re.S)[1]
    (name, module, found) = re.findall(r'`"(\w+)": "moe_jax\.offload\.(\w+):(\w+)",`', TEXT)[0]
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(config.POLICIES, name, f"{module}:{found}")
    return getattr(__import__(module), found)


@pytest.mark.parametrize(
    ("uses", "victim"),
    [
        ([(0, 1), (1, 0)], (1, 1)),  # layer 1 runs: it comes last again
        ([(0, 1), (1, 0), (0, 0)], (0, 1)),  # the next token's layer 0
        ([(2, 1)], (2, 0)),
    ],
)
def test_victim(farthest, uses, victim):
    policy = farthest()
    state = policy.init()
    for key in uses:
        state = policy.on_use(state, key)
    assert policy.on_use(state, (2, 3), needed=False) == state
    candidates = dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)])
    assert policy.victim(state, candidates, lambda keys: pytest.fail("it needs no prediction")) == victim


def test_it_runs_in_the_engine_and_changes_no_text(farthest, tmp_path):
    checkpoint = str(write_tiny(tmp_path, dataclasses.replace(TINY, eos_ids=())))
    texts, moved = [], []
    for policy in ("lru", "farthest"):
        offload = {"device_budget": "40%", "policy": policy}
        model = moe_jax.load(checkpoint=checkpoint, prefetch={"predictor": "none"}, offload=offload)
        generation = model.start(["abc"], 12)
        texts.append("".join(piece for _, piece in generation))
        moved.append(model.metrics(generation, bounds=False)["bytes_per_token"]["demand"])
        model.close()
    assert texts[0] == texts[1] and moved[0] != moved[1]

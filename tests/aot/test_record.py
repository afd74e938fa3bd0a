"""What the engine calls at real sizes is what it compiled before, whatever the routing; nothing is computed here."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moe_jax.checkpoint.families import family
from moe_jax.inference.compilation import compile_for
from tests.aot.record import abstract_engine, abstract_experts, recording
from tests.families.test_real_sizes import MODELS


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("model", ["Mixtral-8x7B", "Qwen3-30B-A3B"])
def test_calls_only_what_it_compiled(model, batch):
    a = family(MODELS[model].config).read_config(MODELS[model].config)
    a = dataclasses.replace(a, layers=a.layers[:2])
    with recording() as calls:
        engine = abstract_engine(a)
        compile_for(engine, [600] * batch, 7000, abstract_experts(a))
        compiled = len(calls)
        assert compiled > 10
        _, state = engine.prefill([[1] * 600] * batch, 7000)
        for _ in range(3):
            engine.decode(np.zeros(batch, np.int32), state)
        late = [(call[0].name, call[1]) for call in list(calls.values())[compiled:]]
    assert late == []

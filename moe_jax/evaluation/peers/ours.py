"""This engine, run as the peers are: in a process of its own, mean times."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_jax.config import Config
from moe_jax.evaluation.peers.run import Run
from moe_jax.inference.session import Model


def run(config: dict[str, Any], prompt: str, new_tokens: int, bounds: bool) -> tuple[Run, dict[str, Any]]:
    """A run, and its `metrics`; `bounds`: measure those too, afterwards."""
    model = Model(Config.from_dict(config))
    generation = model.start([prompt], new_tokens)
    for _ in generation:
        pass
    timing = generation.timing
    metrics = model.metrics(generation, bounds)
    result = Run(generation.outputs[0].token_ids, float(np.mean(timing.step_s)), timing.ttft_s[0])
    model.close()
    return result, metrics

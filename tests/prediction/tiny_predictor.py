"""A predictor for a tiny checkpoint with the file format of a trained one, and weights that say something."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.offload.history import SCALES
from moe_jax.prediction import saved, usage
from moe_jax.prediction.interface import ModelParts, Spec, fingerprint
from moe_jax.prediction.learned import Learned
from moe_jax.prediction.usage import Usage


def write_predictor(directory: Path, checkpoint: HFCheckpoint, horizon: int) -> Path:
    """Random tables: useless as a prediction, and so a good test of everything that must not depend on it."""
    spec, parts = Spec.of(checkpoint.architecture, horizon), ModelParts.of(checkpoint.dense())
    params = Learned().init(jax.random.key(0), spec, parts)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    row = {"row": np.zeros(1, np.int32)}  # all tokens are the same to it
    params["network"] = {
        name: table + 0.1 * jax.random.normal(next(keys), table.shape) for name, table in params["network"].items()
    } | row
    sizes = (spec.num_layers, spec.num_experts, spec.d_model)
    weights = {"network": params["network"], "vectors": jax.random.normal(next(keys), sizes)}
    weights["best"] = jax.random.randint(next(keys), (spec.num_layers + 1, spec.horizon), 0, 4)
    identity = fingerprint(checkpoint.architecture, checkpoint.dense())
    saved.save(directory, weights, spec, identity, {})
    rng, experts = np.random.default_rng(2), spec.num_layers * spec.num_experts
    scales = len(SCALES)
    shapes = {"bias": (experts,), "own": (scales, experts), "enter": (scales * experts, 4), "enter_bias": (4,)}
    shapes["leave"] = (4, experts)
    usage.store(directory, identity, Usage(**{name: rng.normal(size=shape) for name, shape in shapes.items()}))
    return directory

"""The predictors by name, and `load`, which makes one ready to use."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import PREDICTORS
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture
from moe_jax.prediction import calibration, learned, saved
from moe_jax.prediction.best import CANDIDATES, BestPerLayer
from moe_jax.prediction.interface import Features, ModelParts, Prediction, Predictor, Spec, fingerprint
from moe_jax.prediction.learned import Learned
from moe_jax.prediction.lookahead import DefaultVector, Router
from moe_jax.prediction.memory import Frequency, Random, Repeat
from moe_jax.prediction.oracle import Oracle

__all__ = [
    "TRAINED",
    "BestPerLayer",
    "DefaultVector",
    "Features",
    "Frequency",
    "Learned",
    "Oracle",
    "Prediction",
]
__all__ += ["Predictor", "Random", "Repeat", "Router", "Spec", "load", "named", "params_of"]


TRAINED = (DefaultVector.name, Learned.name, BestPerLayer.name)
OURS = (*(p.name for p in (Learned, BestPerLayer, Router, DefaultVector, Repeat, Frequency, Random)),)
"""In the order in which tables name them."""


def compared() -> dict[str, Predictor]:
    """For tables of recall: ours, then whatever else is registered. The oracle would be right everywhere."""
    others = [name for name in PREDICTORS if name not in (*OURS, "none", Oracle.name)]
    return {name: named(name) for name in (*OURS, *others)}


def named(name: str) -> Predictor:
    """The predictor of this name, one of `config.PREDICTORS` but "none"; its parameters are another matter."""
    return pkgutil.resolve_name(PREDICTORS[name])()


def params_of(name: str, spec: Spec, parts: ModelParts, weights: dict[str, Any], seed: int = 0) -> Any:
    """Parameters of a predictor of this name.

    Args:
      weights: those of `saved.load`, none without a trained one; and, if there is any, as `sharpness` what
        `calibration.stored` gave.
    """
    if name in calibration.LOOKAHEADS:
        params = Router().init(jax.random.key(seed), spec, parts)
        if name == DefaultVector.name:
            params |= {"vectors": jnp.asarray(weights["vectors"])}
        own = weights.get("sharpness", {}).get(name)
        return params if own is None else params | {"sharpness": jnp.asarray(own)}
    if name == Learned.name:
        return learned.params_of(weights["network"], spec)
    if name == BestPerLayer.name:
        best = np.asarray(weights["best"]).astype(np.int32)
        used = [candidate for number, candidate in enumerate(CANDIDATES) if (best == number).any()]
        own = {candidate: params_of(candidate, spec, parts, weights, seed) for candidate in used}
        return own | {"best": jnp.asarray(best)}
    return named(name).init(jax.random.key(seed), spec, parts)


def load(
    name: str, horizon: int, directory: str | Path, architecture: Architecture, dense: Any, seed: int = 0
) -> tuple[Predictor, Spec, Any] | None:
    """A predictor ready to use: itself, its spec and its parameters; None for "none".

    Args:
      name: one of `config.prefetch.predictor`.
      horizon: layers ahead to score; at most the one that a trained predictor was trained for.
      directory: of what train_predictor.py made (for those of `TRAINED`).
      architecture, dense: of the model; dense is the pure dict of `layers.Decoder`.

    Raises:
      UserError: an unknown name, a horizon out of range, or a trained predictor that is missing or not for this model.
    """
    if name == "none":
        return None
    spec, parts = Spec.of(architecture, horizon), ModelParts.of(dense)
    if name not in PREDICTORS:
        raise UserError(f"unknown predictor {name!r}; choose {', '.join(PREDICTORS)}")
    weights: dict[str, Any] = {}
    if name in TRAINED:
        if not str(directory):
            raise UserError(
                f"predictor {name} is trained, and there is none for this model: train one with train_predictor.py and"
                " pass it with --config.prefetch.checkpoint=DIR, or choose --config.prefetch.predictor=router"
            )
        weights = saved.load(directory, spec, fingerprint(architecture, dense))
    elif name == Router.name and str(directory):
        weights = {"sharpness": calibration.stored(directory, spec, fingerprint(architecture, dense))}
    return named(name), spec, params_of(name, spec, parts, weights, seed)

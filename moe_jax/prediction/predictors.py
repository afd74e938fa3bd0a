"""The predictors by name, and `load`, which makes one ready to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture
from moe_jax.prediction import saved
from moe_jax.prediction.interface import Features, ModelParts, Prediction, Predictor, Spec, fingerprint
from moe_jax.prediction.learned import Learned
from moe_jax.prediction.lookahead import Router
from moe_jax.prediction.memory import Frequency, Random, Repeat

__all__ = ["BASELINES", "Features", "Frequency", "Learned", "Prediction", "Predictor", "Random", "Repeat", "Router"]
__all__ += ["Spec", "load"]


BASELINES: dict[str, Predictor] = {p.name: p for p in (Random(), Frequency(), Repeat(), Router())}


def load(
    name: str, horizon: int, directory: str | Path, architecture: Architecture, dense: Any, seed: int = 0
) -> tuple[Predictor, Spec, Any] | None:
    """A predictor ready to use: itself, its spec and its parameters; None for "none".

    Args:
      name: one of `config.prefetch.predictor`.
      horizon: layers ahead to score; at most the one that a learned predictor was trained for.
      directory: of a trained predictor (for "learned").
      architecture, dense: of the model; dense is the pure dict of `layers.Decoder`.

    Raises:
      UserError: an unknown name, a horizon out of range, or a trained predictor that is missing or not for this model.
    """
    if name == "none":
        return None
    spec, parts = Spec.of(architecture, horizon), ModelParts.of(dense)
    if name == Learned.name:
        if not str(directory):
            raise UserError(
                "no learned predictor is given for this model: train one with train_predictor.py and pass it with"
                " --config.prefetch.checkpoint=DIR, or choose --config.prefetch.predictor=router"
            )
        return Learned(), spec, saved.load(directory, spec, fingerprint(spec, parts))
    if name not in BASELINES:
        raise UserError(f"unknown predictor {name!r}; choose none, {', '.join(BASELINES)} or {Learned.name}")
    predictor = BASELINES[name]
    return predictor, spec, predictor.init(jax.random.key(seed), spec, parts)

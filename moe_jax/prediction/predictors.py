"""Predictors that need no training, and `load`, which finds a predictor by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture
from moe_jax.prediction import saved
from moe_jax.prediction.interface import (
    Features,
    ModelParts,
    Predictor,
    Spec,
    fingerprint,
    last_ids,
    multi_hot,
    targets,
)
from moe_jax.prediction.learned import Learned

__all__ = ["BASELINES", "Features", "Frequency", "Learned", "Predictor", "Random", "Repeat", "Router", "Spec", "load"]


def _offsets(spec: Spec) -> jax.Array:
    return jnp.arange(1, spec.horizon + 1, dtype=jnp.int32)


class Random:
    """Guesses: every expert gets a random probability with the right mean. The floor that others must beat."""

    name = "random"

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        return {"offsets": _offsets(spec), "key": jax.random.key_data(rng), "prior": jnp.float32(spec.prior)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return {"calls": jnp.zeros((), jnp.int32)}

    def prime(self, spec: Spec, ids: np.ndarray) -> Any:
        return self.init_state(spec, ids.shape[1])

    def apply(self, params: Any, state: Any, features: Features) -> tuple[jax.Array, Any]:
        key = jax.random.fold_in(jax.random.wrap_key_data(params["key"]), state["calls"])
        shape = (features.logits.shape[0], params["offsets"].shape[0], features.logits.shape[1])
        spread = jnp.minimum(params["prior"], 1 - params["prior"])  # keeps the mean and stays in [0, 1]
        guess = params["prior"] + spread * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
        return guess, {"calls": state["calls"] + 1}


class Frequency:
    """How often each expert of a layer was chosen so far in this text."""

    name = "frequency"

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        return {"offsets": _offsets(spec)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return {"counts": jnp.zeros((batch, spec.num_layers, spec.num_experts), jnp.float32)}

    def prime(self, spec: Spec, ids: np.ndarray) -> Any:
        L, B = ids.shape[:2]
        counts = np.zeros((B, L, spec.num_experts), np.float32)
        layer, row, token, choice = np.nonzero(ids >= 0)
        np.add.at(counts, (row, layer, ids[layer, row, token, choice]), 1)
        return {"counts": jnp.asarray(counts)}

    def apply(self, params: Any, state: Any, features: Features) -> tuple[jax.Array, Any]:
        E, K = features.logits.shape[1], features.ids.shape[1]
        counts = state["counts"].at[:, features.layer].add(multi_hot(features.ids, E))
        seen = counts[:, targets(params["offsets"], features.layer, counts.shape[1])]  # [B, H, E]
        tokens = seen.sum(-1, keepdims=True) / K
        return (seen + K / E) / (tokens + 1), {"counts": counts}


class Repeat:
    """The experts that the last token used in the same layer; how often that holds is counted while running."""

    name = "repeat"

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        return {"offsets": _offsets(spec)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return self.prime(spec, np.full((spec.num_layers, batch, 1, spec.top_k), -1))

    def prime(self, spec: Spec, ids: np.ndarray) -> Any:
        same = (ids[:, :, 1:, :, None] == ids[:, :, :-1, None, :]).any(-1) & (ids[:, :, 1:] >= 0)
        return {
            "last": jnp.asarray(last_ids(ids)),
            "hits": jnp.asarray(same.sum((0, 2, 3)), jnp.float32),  # [B]: choices that the token before also made
            "asked": jnp.asarray((ids[:, :, 1:] >= 0).sum((0, 2, 3)), jnp.float32),  # [B]
        }

    def apply(self, params: Any, state: Any, features: Features) -> tuple[jax.Array, Any]:
        E, K = features.logits.shape[1], features.ids.shape[1]
        before = state["last"][:, features.layer]
        hits = state["hits"] + (features.ids[:, :, None] == before[:, None, :]).any(-1).sum(-1)
        asked = state["asked"] + (before >= 0).sum(-1)
        last = state["last"].at[:, features.layer].set(features.ids)
        chosen = multi_hot(last[:, targets(params["offsets"], features.layer, last.shape[1])], E)  # [B, H, E]
        # At least a little above the prior: the last token's experts stay ranked first.
        rate = jnp.maximum((hits + K / E) / (asked + 1), K / E + 1e-3)[:, None, None]
        others = jnp.maximum(K * (1 - rate) / max(E - K, 1), 0.0)
        known = chosen.any(-1, keepdims=True)
        probability = jnp.where(known, jnp.where(chosen > 0, rate, others), K / E)
        return probability, {"last": last, "hits": hits, "asked": asked}


class Router:
    """Router look-ahead: the target layer's own norm and router applied to this layer's residual, as it stands."""

    name = "router"

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        weights = parts.routers * parts.expert_norms[:, None]
        return {"offsets": _offsets(spec), "routers": jnp.asarray(weights), "eps": jnp.float32(spec.norm_eps)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return ()

    def prime(self, spec: Spec, ids: np.ndarray) -> Any:
        return ()

    def apply(self, params: Any, state: Any, features: Features) -> tuple[jax.Array, Any]:
        x = features.residual.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + params["eps"])
        routers = params["routers"]
        ahead = routers[targets(params["offsets"], features.layer, routers.shape[0])]  # [H, E, D]
        return membership(jnp.einsum("bd,hed->bhe", x, ahead), features.ids.shape[1]), state


def membership(logits: jax.Array, top_k: int) -> jax.Array:
    """Router logits [..., E] to probabilities of being among the top K: a sigmoid, moved so that they sum to K."""
    low, high = logits.min(-1, keepdims=True) - 10, logits.max(-1, keepdims=True) + 10

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        above = jax.nn.sigmoid(logits - middle).sum(-1, keepdims=True) > top_k
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, 16, halve, (low, high))
    return jax.nn.sigmoid(logits - (low + high) / 2)


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

"""Predictors that look at no activation: guesses, and what experts were used before."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.prediction.interface import Features, ModelParts, Prediction, Spec, last_ids, multi_hot, targets
from moe_jax.prediction.membership import from_probability


def _offsets(spec: Spec) -> jax.Array:
    return jnp.arange(1, spec.horizon + 1, dtype=jnp.int32)


class Random:
    """Guesses: every expert gets a random probability with the right mean. The floor that others must beat."""

    name = "random"
    begin = None

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        return {"offsets": _offsets(spec), "key": jax.random.key_data(rng), "prior": jnp.float32(spec.prior)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return {"calls": jnp.zeros((), jnp.int32)}

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        return self.init_state(spec, ids.shape[1])

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        key = jax.random.fold_in(jax.random.wrap_key_data(params["key"]), state["calls"])
        shape = (features.logits.shape[0], params["offsets"].shape[0], features.logits.shape[1])
        spread = jnp.minimum(params["prior"], 1 - params["prior"])  # keeps the mean and stays in [0, 1]
        guess = params["prior"] + spread * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
        return from_probability(guess), {"calls": state["calls"] + 1}


class Frequency:
    """How often each expert of a layer was chosen so far in this text."""

    name = "frequency"
    begin = None

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        return {"offsets": _offsets(spec)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return {"counts": jnp.zeros((batch, spec.num_layers, spec.num_experts), jnp.float32)}

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        L, B = ids.shape[:2]
        counts = np.zeros((B, L, spec.num_experts), np.float32)
        layer, row, token, choice = np.nonzero(ids >= 0)
        np.add.at(counts, (row, layer, ids[layer, row, token, choice]), 1)
        return {"counts": jnp.asarray(counts)}

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        E, K = features.logits.shape[1], features.ids.shape[1]
        counts = state["counts"].at[:, features.layer].add(multi_hot(features.ids, E))
        seen = counts[:, targets(params["offsets"], features.layer, counts.shape[1])]  # [B, H, E]
        tokens = seen.sum(-1, keepdims=True) / K
        return from_probability((seen + K / E) / (tokens + 1)), {"counts": counts}


class Repeat:
    """The experts that the last token used in the same layer; how often that holds is counted while running."""

    name = "repeat"
    begin = None

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        return {"offsets": _offsets(spec)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return self.prime(spec, np.full((spec.num_layers, batch, 1, spec.top_k), -1))

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        same = (ids[:, :, 1:, :, None] == ids[:, :, :-1, None, :]).any(-1) & (ids[:, :, 1:] >= 0)
        return {
            "last": jnp.asarray(last_ids(ids)),
            "hits": jnp.asarray(same.sum((0, 2, 3)), jnp.float32),  # [B]: choices that the token before also made
            "asked": jnp.asarray((ids[:, :, 1:] >= 0).sum((0, 2, 3)), jnp.float32),  # [B]
        }

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
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
        return from_probability(probability), {"last": last, "hits": hits, "asked": asked}

"""Look-ahead with the model's own routers: applied to this layer's residual, or to the quasi-hidden state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.prediction.interface import Array, Features, ModelParts, Prediction, Rule, Spec, targets
from moe_jax.prediction.membership import from_logits


class Router:
    """Router look-ahead: the target layer's own norm and router applied to this layer's residual, as it stands."""

    name = "router"

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        layers = {"routers": parts.routers * parts.expert_norms[:, None]}
        layers |= {"biases": parts.router_biases} if parts.router_biases is not None else {}
        layers |= {"corrections": parts.corrections} if parts.corrections is not None else {}
        return {
            "layers": jax.tree.map(jnp.asarray, layers),  # everything of the target layers, stacked
            "offsets": jnp.arange(1, spec.horizon + 1, dtype=jnp.int32),
            "eps": jnp.float32(spec.norm_eps),
            "rule": Rule(spec.routing),
        }

    def init_state(self, spec: Spec, batch: int) -> Any:
        return ()

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        return ()

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        return _look(params, features.residual, features.layer), state

    def begin(self, params: Any, state: Any, embedding: jax.Array) -> tuple[Prediction, Any]:
        return _look(params, embedding, -1), state


class DefaultVector:
    """The look-ahead of arXiv 2603.19289: the residual gets what the chosen experts add on average.

    `vectors` [L, E, D] of its parameters are the mean outputs d[l, e] of expert e of layer l over calibration tokens
    routed to it; the quasi-hidden state is the target's norm of `r_l + sum_e w_e d[l, e]`.
    """

    name = "default_vector"

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        """Without calibration: vectors of zeros, which give the router look-ahead."""
        vectors = jnp.zeros((spec.num_layers, spec.num_experts, spec.d_model))
        return Router().init(rng, spec, parts) | {"vectors": vectors}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return ()

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        return ()

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        vectors = params["vectors"][features.layer, features.ids]  # [B, K, D]
        added = jnp.einsum("bk,bkd->bd", features.gates, vectors)
        return _look(params, features.residual.astype(jnp.float32) + added, features.layer), state

    def begin(self, params: Any, state: Any, embedding: jax.Array) -> tuple[Prediction, Any]:
        return _look(params, embedding, -1), state


def _look(params: Any, hidden: Array, layer: Any) -> Prediction:
    """The routers of the layers after `layer` on `hidden` [B, D]."""
    x = hidden.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + params["eps"])
    layers = params["layers"]
    ahead = targets(params["offsets"], layer, layers["routers"].shape[0])
    logits = jnp.einsum("bd,hed->bhe", x, layers["routers"][ahead])
    if "biases" in layers:
        logits = logits + layers["biases"][ahead]
    correction = layers["corrections"][ahead] if "corrections" in layers else None
    return from_logits(logits, params["rule"].routing, correction)


def default_vectors(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Mean outputs d float32 [L, E, D] out of sums [L, E, D] and counts [L, E], and how many experts were never seen.

    An expert that no calibration token was routed to gets the mean output over its layer, whichever the expert: the
    best guess while nothing is known of it.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.int64)
    layer = sums.sum(1, keepdims=True) / np.maximum(counts.sum(1), 1)[:, None, None]
    means = np.where((counts > 0)[..., None], sums / np.maximum(counts, 1)[..., None], layer)
    return means.astype(np.float32), int((counts == 0).sum())

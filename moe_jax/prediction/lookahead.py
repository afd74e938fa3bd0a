"""Look-ahead with the model's own routers: applied to this layer's residual, or to the quasi-hidden state.

A router that looks ahead sees a state that is not the one it will decide on, and its logits say too much, the more so
the further ahead. `sharpness` [L + 1, H] (row 0 before layer 0, row l + 1 at layer l) is how much they count: the
probabilities are those of `membership` of the standardised logits times it. It changes no ranking. `calibration.py`
fits it on text; `default_sharpness` is for a model that has no such fit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.prediction.interface import Array, Features, ModelParts, Prediction, Rule, Spec, targets
from moe_jax.prediction.membership import membership, standardised


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
            "sharpness": jnp.asarray(default_sharpness(spec)),
        }

    def init_state(self, spec: Spec, batch: int) -> Any:
        return ()

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        return ()

    def hidden(self, params: Any, features: Features) -> Array:
        """What the routers look at, before the target's norm, [B, D]."""
        return features.residual

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        return _look(params, self.hidden(params, features), features.layer), state

    def begin(self, params: Any, state: Any, embedding: jax.Array, tokens: Array) -> tuple[Prediction, Any]:
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

    def hidden(self, params: Any, features: Features) -> Array:
        """The quasi-hidden state before the target's norm, float32 [B, D]."""
        vectors = params["vectors"][features.layer, features.ids]  # [B, K, D]
        return features.residual.astype(jnp.float32) + jnp.einsum("bk,bkd->bd", features.gates, vectors)

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        return _look(params, self.hidden(params, features), features.layer), state

    def begin(self, params: Any, state: Any, embedding: jax.Array, tokens: Array) -> tuple[Prediction, Any]:
        return _look(params, embedding, -1), state


def _look(params: Any, hidden: Array, layer: Any) -> Prediction:
    logits, values = look(params, hidden, layer)
    sharpness = params["sharpness"][layer + 1][:, None]
    return Prediction(membership(sharpness * values, params["rule"].routing.top_k), logits)


def look(params: Any, hidden: Array, layer: Any) -> tuple[jax.Array, jax.Array]:
    """The routers of the layers after `layer` on `hidden` [B, D]: their logits, and these standardised, [B, H, E]."""
    x = hidden.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + params["eps"])
    layers, routing = params["layers"], params["rule"].routing
    ahead = targets(params["offsets"], layer, layers["routers"].shape[0])
    logits = jnp.einsum("bd,hed->bhe", x, layers["routers"][ahead])
    if "biases" in layers:
        logits = logits + layers["biases"][ahead]
    correction = layers["corrections"][ahead] if "corrections" in layers else None
    return logits, standardised(logits, routing, correction)


def default_sharpness(spec: Spec) -> np.ndarray:
    """Sharpness float32 [L + 1, H] where nothing was fitted: what the fit of the shipped model comes near to.

    9 for the next layer, falling with the distance to the power 0.7; 0.25 for a target in the next token, of which this
    token's state says next to nothing. An embedding knows little of the layers: 1 over the distance.
    """
    distance = np.arange(1, spec.horizon + 1)
    wraps = np.arange(spec.num_layers)[:, None] + distance >= spec.num_layers
    return np.vstack([1 / distance, np.where(wraps, 0.25, 9 * distance**-0.7)]).astype(np.float32)


def default_vectors(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Mean outputs d float32 [L, E, D] out of sums [L, E, D] and counts [L, E], and how many experts were never seen.

    An expert that no calibration token was routed to gets the mean output over its layer, whichever the expert: the
    best guess while nothing is known of it.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.int64)
    layer = sums.sum(1, keepdims=True) / np.maximum(counts.sum(1), 1)[:, None, None]
    means = np.where((counts > 0)[..., None], sums / np.maximum(counts, 1)[..., None], layer)
    return means.astype(np.float32), int((counts == 0).sum())

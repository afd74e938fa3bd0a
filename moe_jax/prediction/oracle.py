"""The oracle: a replay of routing that an earlier run of the same request recorded. No predictor can do better.

    ids = recorded(record.ids, num_layers)               # of a run without it: `Record.ids` of the engine
    predictor, params = Oracle(), Oracle.replay(spec, ids)
    state = predictor.prime(spec, prompt_ids)

In exact mode the second run routes as the first did, whatever is prefetched, so that the replay stays right. Rows that
leave the recorded path (another prompt, another seed) get NaN, which the engine reports as a run that is not the one
that the predictor was made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.prediction.interface import Array, Features, ModelParts, Prediction, Spec, multi_hot


def recorded(ids: Sequence[np.ndarray], num_layers: int) -> np.ndarray:
    """One int32 [B, K] per decode step and expert layer, in order, to [S, L, B, K]; an incomplete step is cut off."""
    steps = len(ids) // num_layers
    if not steps:
        raise UserError("the oracle has no recorded decode step: generate at least two tokens")
    stacked = np.stack(list(ids[: steps * num_layers])).astype(np.int32)
    return stacked.reshape(steps, num_layers, *stacked.shape[1:])


class Oracle:
    """Probability 1 for the experts that the recorded run used, 0 for the others; nothing beyond its end."""

    name = "oracle"

    @staticmethod
    def replay(spec: Spec, ids: np.ndarray) -> Any:
        """Parameters: ids int [S, L, B, K] of the decode steps 0..S-1 of the rows of a batch."""
        steps, layers, batch, top_k = ids.shape
        assert (layers, top_k) == (spec.num_layers, spec.top_k), "recorded of another model"
        # A horizon of nothing follows the end, so that the last layers can look ahead.
        nothing = np.full((spec.horizon, batch, top_k), -1, np.int32)
        path = np.concatenate([ids.reshape(steps * layers, batch, top_k).astype(np.int32), nothing])
        return {
            "path": jnp.asarray(path),  # [S L + H, B, K]
            "layers": jnp.int32(layers),
            # Only their lengths matter: sizes of what is predicted, known when compiled.
            "ahead": jnp.arange(spec.horizon, dtype=jnp.int32),
            "experts": jnp.arange(spec.num_experts, dtype=jnp.int32),
        }

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        raise UserError(
            "the oracle replays a recorded run and cannot be made without one: infer.py records it for one batch of"
            " prompts; elsewhere choose another --config.prefetch.predictor"
        )

    def init_state(self, spec: Spec, batch: int) -> Any:
        return {"step": jnp.zeros((), jnp.int32)}

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        return {"step": jnp.int32(step)}

    def begin(self, params: Any, state: Any, embedding: jax.Array, tokens: Array) -> tuple[Prediction, Any]:
        right = jnp.ones(embedding.shape[0], bool)
        return _ahead(params, state["step"] * params["layers"], right), state

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        here = state["step"] * params["layers"] + features.layer
        # The engine may run one step more than it recorded: -1 is any expert.
        then = jax.lax.dynamic_index_in_dim(params["path"], here, keepdims=False)
        right = ((then == features.ids) | (then < 0)).all(-1)
        step = state["step"] + (features.layer == params["layers"] - 1)
        return _ahead(params, here + 1, right), {"step": step}


def _ahead(params: Any, start: jax.Array, right: jax.Array) -> Prediction:
    """The recorded experts of the layers from `start` on [B, H, E]; NaN for rows that are not `right`, bool [B]."""
    H, E = len(params["ahead"]), len(params["experts"])
    ids = jax.lax.dynamic_slice_in_dim(params["path"], start, H)  # [H, B, K]
    probability = multi_hot(ids, E).swapaxes(0, 1)
    probability = jnp.where(right[:, None, None], probability, jnp.nan)
    # Far apart, as of a router that is sure; the gates among the chosen are not recorded.
    return Prediction(probability, 20 * probability)

"""For every layer and horizon, the predictor that was the best there on validation text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.prediction.interface import Array, Features, ModelParts, Prediction, Predictor, Spec, at
from moe_jax.prediction.learned import Learned
from moe_jax.prediction.lookahead import DefaultVector, Router
from moe_jax.prediction.memory import Repeat

CANDIDATES: dict[str, Predictor] = {p.name: p for p in (Router(), DefaultVector(), Repeat(), Learned())}
"""In the order of the numbers that `choose` gives."""


def choose(recall: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray | None]) -> np.ndarray:
    """The number of the best candidate, int [L + 1, H]: row 0 before layer 0, row l + 1 at layer l.

    Args:
      recall: of every candidate on validation text, [L, H].
      first: the same of what it says before layer 0, [H]; None if it says nothing then.
    """
    never = np.full(next(iter(recall.values())).shape[1], -1.0)
    rows = [[never if (own := first[name]) is None else own for name in CANDIDATES]]
    rows += [[recall[name][layer] for name in CANDIDATES] for layer in range(len(recall[Router.name]))]
    return np.stack(rows).argmax(1)


class BestPerLayer:
    """Asks those candidates that are the best somewhere. Parameters: theirs by name, and `best` int [L + 1, H]."""

    name = "best_per_layer"

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        """Without validation: the router look-ahead everywhere."""
        router = Router().init(rng, spec, parts)
        return {Router.name: router, "best": jnp.zeros((spec.num_layers + 1, spec.horizon), jnp.int32)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return {name: candidate.init_state(spec, batch) for name, candidate in CANDIDATES.items()}

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        return {name: candidate.prime(spec, ids, step) for name, candidate in CANDIDATES.items()}

    def at(self, params: Any, layer: int) -> Any:
        own = {name: at(CANDIDATES[name], params[name], layer) for name in CANDIDATES if name in params}
        return own | {"best": params["best"][layer + 1]}

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        asked = {name: CANDIDATES[name].apply for name in CANDIDATES if name in params}
        return self._ask(asked, params, state, features.layer + 1, features)

    def begin(self, params: Any, state: Any, embedding: jax.Array, tokens: Array) -> tuple[Prediction, Any]:
        asked = {name: begin for name in CANDIDATES if name in params and (begin := CANDIDATES[name].begin)}
        return self._ask(asked, params, state, 0, embedding, tokens)

    def _ask(self, asked: Mapping[str, Any], params: Any, state: Any, place: Any, *seen: Any) -> tuple[Prediction, Any]:
        best = params["best"] if params["best"].ndim == 1 else params["best"][place]
        best, state = best[None, :, None], dict(state)  # [1, H, 1]
        answers: list[tuple[int, Prediction]] = []
        for number, name in enumerate(CANDIDATES):
            if name in asked:
                prediction, state[name] = asked[name](params[name], state[name], *seen)
                answers.append((number, prediction))
        chosen = [best == number for number, _ in answers]
        # Nobody is the best who did not answer, so that the last resort is never taken.
        pick = lambda *values: jnp.select(chosen, list(values), values[0])
        return jax.tree.map(pick, *(prediction for _, prediction in answers)), state

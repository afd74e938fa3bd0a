"""`Forecast`: a predictor as the decode loop asks it, and what asking costs."""

from __future__ import annotations

import functools
import timeit
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.inference.execution import Execution, Plan
from moe_jax.model.decoder import Routed, committed
from moe_jax.model.platforms import for_host, jitted
from moe_jax.prediction.interface import Features, Prediction, Predictor, Spec, at

Said = tuple[jax.Array, Plan | None]
"""P(needed by any active row) float32 [H, E] for the layers that follow; what the first of them is to run, if the
execution mode plans that."""


class Announced:
    """A prediction made at a layer (-1: before layer 0), which can be read as soon as it has been worked out.

    Attributes:
      offered: whether the source has been told.
    """

    def __init__(self, layer: int, probabilities: jax.Array):
        """`probabilities`: float32 [H, E] for the layers that follow."""
        self.layer, self._made, self.offered = layer, probabilities, False

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """As numpy has them; waits for them."""
        return np.asarray(self._made)


class Forecast:
    """A predictor with its parameters, compiled for an execution mode.

    Attributes:
      cost_s: seconds that the predictions of one token take; measured by `compile`.
    """

    def __init__(self, predictor: Predictor, spec: Spec, params: Any, execution: Execution | None, dtype: Any):
        """`execution`: None for `exact`; `dtype`: of the residual."""
        self.predictor, self.spec, self.cost_s = predictor, spec, 0.0
        self._execution, self._dtype = execution, dtype
        jit = functools.partial(jitted, platform=jax.default_backend(), dtype=jnp.float32)
        self._apply = jit(self._apply_fn)
        self._begin = None if predictor.begin is None else jit(self._begin_fn)
        self.use_parameters(params)

    def use_parameters(self, params: Any) -> None:
        """Replaces the parameters by others of the same shapes."""
        self.params = committed(params)
        # Cut out once, so that no call has to look for its own among those of all layers.
        layers = range(self.spec.num_layers)
        own = [jax.tree.flatten(at(self.predictor, self.params, layer)) for layer in layers]
        # As lists of arrays: nested dictionaries would be sorted in every call.
        self._own = [(leaves, committed(np.int32(layer))) for layer, (leaves, _) in enumerate(own)]
        self._tree = own[0][1]

    def state(self, ids: np.ndarray, step: int = 0) -> Any:
        """The predictor's own state after tokens that were routed to ids int [L, B, T, K]; -1: no token.

        `step`: of the decode step that follows.
        """
        return committed(self.predictor.prime(self.spec, ids, step))

    def begin(self, state: Any, embedding: jax.Array, tokens: jax.Array, active: jax.Array) -> tuple[Said | None, Any]:
        """What is said before layer 0, from the token alone: embedding [B, D], tokens int32 [B]; and the next state.

        Nothing, where the predictor says nothing then.
        """
        return (None, state) if self._begin is None else self._begin(self.params, state, embedding, tokens, active)

    def after(self, layer: int, state: Any, routed: Routed, active: jax.Array) -> tuple[Said, Any]:
        """What is said once the router of a layer has run, and the next state."""
        params, number = self._own[layer]
        features = Features(number, routed.residual, routed.logits, routed.ids, routed.gates)
        return self._apply(params, state, features, active)

    def compile(self, batch: int, embed: Callable[[jax.Array], jax.Array]) -> None:
        """Compiles every call for a batch size, and measures `cost_s`; `embed`: int32 [B] -> [B, D]."""
        call = self.example(batch)
        jax.block_until_ready(call())
        self.cost_s = self.spec.num_layers * min(timeit.repeat(lambda: jax.block_until_ready(call()), number=1))
        tokens = committed(np.zeros(batch, np.int32))
        jax.block_until_ready(self.begin(self._no_state(batch), embed(tokens), tokens, committed(np.ones(batch, bool))))

    def example(self, batch: int) -> Callable[[], Any]:
        """A call of the predictor alone on zeros, for compilation and timing."""
        s, (params, layer) = self.spec, self._own[0]
        residual, logits = jnp.zeros((batch, s.d_model), self._dtype), jnp.zeros((batch, s.num_experts), jnp.float32)
        ids, gates = jnp.zeros((batch, s.top_k), jnp.int32), jnp.zeros((batch, s.top_k), jnp.float32)
        features, state = Features(layer, *committed((residual, logits, ids, gates))), self._no_state(batch)
        active = committed(np.ones(batch, bool))
        return lambda: self._apply(params, state, features, active)

    def _no_state(self, batch: int) -> Any:
        return self.state(np.zeros((self.spec.num_layers, batch, 1, self.spec.top_k), np.int32))

    def _apply_fn(self, leaves, state, features, active):
        params = jax.tree.unflatten(self._tree, leaves)
        prediction, state = self.predictor.apply(params, state, features)
        return self._said(prediction, features.layer + 1, active), state

    def _begin_fn(self, params, state, embedding, tokens, active):
        assert self.predictor.begin is not None
        prediction, state = self.predictor.begin(params, state, embedding, tokens)
        return self._said(prediction, 0, active), state

    def _said(self, prediction: Prediction, target: Any, active: jax.Array) -> Said:
        """Of a prediction whose first layer is `target`; rows are taken as independent."""
        probability, plan = prediction.probability, None
        if self._execution is not None:
            probability, plan = self._execution.plan(prediction, target)
        needed = 1 - jnp.prod(jnp.where(active[:, None, None], 1 - probability, 1.0), axis=0)
        return for_host(needed, jax.default_backend()), plan

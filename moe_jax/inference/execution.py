"""Execution modes: which experts a decode step runs, and with what gates. `exact` is what the engine does without one.

| mode                | experts of a layer                                 | gates: the router's rule on          |
|---------------------|----------------------------------------------------|--------------------------------------|
| `exact`             | the router's choice                                | the router's logits                  |
| `speculative`       | the K most probable of the prediction made at the  | the predicted logits                 |
|                     | layer before (horizon 1), as in arXiv 2603.19289   |                                      |
| `speculative_gated` | the same                                           | the router's logits of these experts |
| `hybrid`            | as `speculative_gated` where recall on validation text at horizon 1 reaches a threshold,  |
|                     | as `exact` on the other layers                                                            |
| `cache_aware`       | the router's choice after a bonus on the logits of | the router's logits of these experts |
|                     | experts that are logically resident                |                                      |

Layers are those with experts: the layer before is the last one that has experts, whatever dense layers lie between.
Layer 0 has no layer before. It runs what the predictor says of it before the token enters (`begin`), and exactly where
the predictor is silent. Predictors always see the true router's logits, ids and gates. A prompt is prefilled exactly.

Every mode depends on logical state alone, that is on a row's own tokens: never on which copies have arrived, nor on
what earlier requests left on the device, nor on the text of the batch's other rows. Planned experts are stated to the
loader at the layer before, as certain (probability 1), and waited for, so what runs does not depend on the link.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture, Routing
from moe_jax.model.decoder import Routed
from moe_jax.model.router import choose, rank, weigh
from moe_jax.prediction.interface import Prediction, Predictor, multi_hot

PREDICTIVE = ("speculative", "speculative_gated", "hybrid")  # need a predictor


class Plan(NamedTuple):
    """What the next layer is to run."""

    ids: jax.Array  # int32 [B, K], the most probable first
    gates: jax.Array  # float32 [B, K], as predicted


class Execution(Protocol):
    """A mode other than `exact`. Stateless: what it remembers of a request is in `memory`.

    Attributes:
      plans: it runs what is predicted, so that every step must be.
    """

    plans: bool

    def start(self, ids: np.ndarray) -> Any:
        """The memory after prompts: ids int [L, B, T, K] of their tokens, -1 where a row has no token."""
        ...

    def plan(self, prediction: Prediction, target: Any) -> tuple[jax.Array, Plan | None]:
        """Inside jit: P(needed) [B, H, E] to state to the loader, and the plan for layer `target` (int32 []), which is
        the first that the prediction speaks of."""
        ...

    def decide(
        self, layer: int, routed: Routed, plan: Plan | None, memory: Any, active: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        """What layer `layer` runs: ids int32 [B, K], gates float32 [B, K]. Updates `memory`."""
        ...

    def warm_up(self, routed: Routed) -> Any:
        """Compiles what `decide` calls, for one batch size."""
        ...


class Planned:
    """`speculative`, `speculative_gated` and `hybrid`: some or all layers run what was predicted for them.

    Args:
      routing: the model's rule.
      layers: bool [L], the layers that run their plan.
      predicted_gates: use the plan's gates, not the true router's.
    """

    plans = True

    def __init__(self, routing: Routing, layers: Sequence[bool], predicted_gates: bool):
        self.layers = tuple(map(bool, layers))
        self._routing, self._predicted_gates = routing, predicted_gates
        self._regate = jax.jit(lambda logits, ids: regate(logits, ids, routing))

    def start(self, ids: np.ndarray) -> Any:
        return None

    def plan(self, prediction: Prediction, target: Any) -> tuple[jax.Array, Plan | None]:
        probability = prediction.probability
        ids = jax.lax.top_k(probability[:, 0], self._routing.top_k)[1]
        gates = regate(prediction.logits[:, 0], ids, self._routing)
        # The layer after the last is the next token's layer 0, which `begin` plans, if anyone.
        planned = jnp.asarray([*self.layers, False])[target] & ~jnp.isnan(probability[:, 0])
        certain = jnp.where(planned, multi_hot(ids, probability.shape[-1]), probability[:, 0])
        return probability.at[:, 0].set(certain), Plan(ids, gates)

    def decide(
        self, layer: int, routed: Routed, plan: Plan | None, memory: Any, active: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        if plan is None or not self.layers[layer]:
            return routed.ids, routed.gates
        gates = plan.gates if self._predicted_gates else self._regate(routed.logits, plan.ids)
        return plan.ids, gates

    def warm_up(self, routed: Routed) -> Any:
        return self._regate(routed.logits, routed.ids)


class CacheAware:
    """`cache_aware`: experts that are logically resident get a bonus when the router chooses.

    A resident expert is preferred to one whose logit is at most `bonus` higher; gates are not touched by the bonus.
    After Cache-Prior routing (arXiv 2412.00099), with a bound on the logits that does not depend on their range.

    Args:
      routing: the model's rule.
      bonus: on the router logits of resident experts.
      capacity: experts that the device budget holds; each row of a batch has an equal share of it.
      num_layers, num_experts: of the model.
      corrections: by layer, float32 [E], where the model has them.
    """

    plans = False

    def __init__(
        self,
        routing: Routing,
        bonus: float,
        capacity: int,
        num_layers: int,
        num_experts: int,
        corrections: Sequence[jax.Array | None] | None = None,
    ):
        self._capacity, self._shape = capacity, (num_layers, num_experts)
        self._corrections = corrections or [None] * num_layers

        def prefer(logits, resident, correction):
            ids, _ = choose(logits + bonus * resident, routing, correction)
            return ids, regate(logits, ids, routing)

        self._prefer = jax.jit(prefer)

    def start(self, ids: np.ndarray) -> list[LogicalCache]:
        """A cache for each row of the batch, with an equal share of the budget. Rows know nothing of each other."""
        rows = [row for row in ids.swapaxes(0, 1) if (row >= 0).any()]
        caches = [LogicalCache(self._capacity // len(rows), *self._shape) for _ in rows]
        for cache, row in zip(caches, rows, strict=True):
            for layer, used in enumerate(row):
                # Each expert once, by its last use: all that matters to the order of eviction.
                latest = dict.fromkeys(reversed(used[used >= 0].tolist()))
                cache.use(layer, list(reversed(latest)))
        return caches

    def plan(self, prediction: Prediction, target: Any) -> tuple[jax.Array, Plan | None]:
        return prediction.probability, None

    def decide(
        self, layer: int, routed: Routed, plan: Plan | None, memory: list[LogicalCache], active: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        resident = np.zeros(routed.logits.shape, np.float32)  # rows past the prompts are padding
        for row, cache in enumerate(memory):
            resident[row] = cache.resident[layer]
        chosen, gates = self._prefer(routed.logits, resident, self._corrections[layer])
        for cache, used, running in zip(memory, np.asarray(chosen).tolist(), active, strict=False):
            if running:
                cache.use(layer, used)
        return chosen, gates

    def warm_up(self, routed: Routed) -> Any:
        return self._prefer(routed.logits, np.zeros(routed.logits.shape, np.float32), self._corrections[0])


class LogicalCache:
    """The device store as LRU on demand would leave it after a row's own tokens, those of its prompt included.

    Attributes:
      resident: 0 or 1, float32 [L, E].
    """

    def __init__(self, capacity: int, num_layers: int, num_experts: int):
        self.resident = np.zeros((num_layers, num_experts), np.float32)
        self._capacity = capacity
        self._order: OrderedDict[tuple[int, int], None] = OrderedDict()

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of a layer have run, in this order."""
        for expert in experts:
            key = (layer, expert)
            self._order[key] = None
            self._order.move_to_end(key)
            self.resident[key] = 1
            if len(self._order) > self._capacity:
                self.resident[self._order.popitem(last=False)[0]] = 0


def make(
    mode: str,
    a: Architecture,
    dense: Any,
    predictor: Predictor | None,
    *,
    recall: Sequence[float | None] | None = None,
    threshold: float = 0.0,
    bonus: float = 0.0,
    capacity: int | None = None,
) -> Execution | None:
    """The execution mode of that name; None for `exact`.

    Args:
      a, dense: the model.
      predictor: whose predictions are run.
      recall: for `hybrid`: what `recall_file.stored` gave for the predictor.
      threshold: for `hybrid`: layers below it run exactly.
      bonus, capacity: for `cache_aware`; experts that the device holds, None if it holds all.

    Raises:
      UserError: the mode needs a predictor, its recall, or a budget, and there is none.
    """
    if mode == "exact":
        return None
    if mode == "cache_aware":
        if capacity is None:
            raise UserError(
                "execution cache_aware prefers experts that are on the device, and with --config.offload.tier=none all"
                " are; choose --config.offload.tier=host"
            )
        corrections = [dense["layers"][layer]["router"].get("correction_bias") for layer in a.moe_layers]
        return CacheAware(a.routing, bonus, capacity, a.num_moe_layers, a.num_experts, corrections)
    if predictor is None:
        raise UserError(
            f"execution {mode} runs predicted experts and there is no predictor; choose"
            " --config.prefetch.predictor=router, or --config.execution=exact"
        )
    layers = [predictor.begin is not None] + [True] * (a.num_moe_layers - 1)
    if mode == "hybrid":
        if recall is None:
            raise UserError(
                f"execution hybrid needs to know how well each layer is predicted, and no recall on validation text is"
                f" stored for predictor {predictor.name}; measure it with evaluate.py --measure_recall, or choose"
                " --config.execution=speculative_gated"
            )
        if len(recall) != len(layers):
            raise UserError(
                f"the recall stored for predictor {predictor.name} is of a model of {len(recall)} layers, this one has"
                f" {len(layers)}; measure it with evaluate.py --measure_recall"
            )
        layers = [able and r is not None and r >= threshold for able, r in zip(layers, recall, strict=True)]
    return Planned(a.routing, layers, predicted_gates=mode == "speculative")


def regate(logits: jax.Array, ids: jax.Array, routing: Routing) -> jax.Array:
    """Gates [B, K] that the router's rule gives to experts ids [B, K], chosen by whomever, from logits [B, E]."""
    scores, _ = rank(logits, routing)
    return weigh(jnp.take_along_axis(scores, ids, axis=-1), routing)

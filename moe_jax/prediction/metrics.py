"""How good predictions are: recall@K, exact sets, covered gates, Brier score, calibration; per layer and horizon."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model.platforms import reproducible
from moe_jax.prediction.activation_log import ActivationLog, Activations
from moe_jax.prediction.interface import Features, Predictor, Spec, multi_hot

BINS = 10


@dataclasses.dataclass(frozen=True)
class Scores:
    """Means over tokens, [L, H] each; column h - 1 is h layers ahead.

    Attributes:
      recall: share of the true top K among the K experts ranked first.
      exact: share of tokens whose K experts ranked first are the true top K.
      covered: share of the gates' sum that belongs to experts ranked among the first K.
      brier: mean squared error of the probabilities, over experts.
      calibration_error: |mean probability - observed share|, averaged over ten bins by their weight.
      first: [H], recall of what was predicted from the token alone for layers 0..H-1; None: nothing was.
    """

    recall: np.ndarray
    exact: np.ndarray
    covered: np.ndarray
    brier: np.ndarray
    calibration_error: np.ndarray
    first: np.ndarray | None = None

    def by_horizon(self, name: str, wrapped: bool) -> list[float | None]:
        """Mean over layers of one score at every horizon, over targets in the next token or only in the same one."""
        values = getattr(self, name)
        wraps = wrapped_targets(*values.shape)
        columns = [values[wraps[:, h] == wrapped, h] for h in range(values.shape[1])]
        return [float(column.mean()) if len(column) else None for column in columns]

    def layer_0(self) -> float:
        """Recall of layer 0's experts by the latest prediction there is when a token enters."""
        return float(self.recall[-1, 0] if self.first is None else self.first[0])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: [L][H] lists, and means by horizon with wrapped targets apart."""
        result: dict[str, Any] = {"before_layer_0": None if self.first is None else np.round(self.first, 5).tolist()}
        for name in ("recall", "exact", "covered", "brier", "calibration_error"):
            result[name] = {
                "by_layer_and_horizon": np.round(getattr(self, name), 5).tolist(),
                "unwrapped": self.by_horizon(name, wrapped=False),
                "wrapped": self.by_horizon(name, wrapped=True),
            }
        return result


def wrapped_targets(num_layers: int, horizon: int) -> np.ndarray:
    """Bool [L, H]: the target belongs to the next token."""
    return np.arange(num_layers)[:, None] + np.arange(1, horizon + 1) >= num_layers


def evaluate(
    predictor: Predictor,
    params: Any,
    spec: Spec,
    log: ActivationLog,
    windows: np.ndarray | None = None,
    batch: int = 120,
) -> Scores:
    """Runs `apply` over logged windows token by token and layer by layer, exactly as a decode loop would.

    The first token of a window, of which a predictor with a memory knows nothing, is not counted; nor is what lies
    beyond a window's end.
    """
    rows = np.arange(len(log.windows.tokens)) if windows is None else np.asarray(windows)
    state = predictor.init_state(spec, batch)
    run = reproducible()(lambda state, activations: _run(predictor, params, spec, state, activations))
    total: Any = 0.0
    for start in range(0, len(rows), batch):
        part = log.read(rows[start : start + batch])
        missing = batch - len(part.lengths)  # padding rows have length 0: nothing of them counts
        padded = Activations(*(np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in part))
        total = (
            jax.tree.map(lambda x, y: x + np.asarray(y, np.float64), total, run(state, padded))
            if start
            else (jax.tree.map(lambda y: np.asarray(y, np.float64), run(state, padded)))
        )
    count = np.maximum(total["count"], 1)
    bins = np.abs(total["bin_probability"] - total["bin_hits"]).sum(-1) / (count * spec.num_experts)
    first = total["first_hits"] / (np.maximum(total["first_count"], 1) * spec.top_k)
    return Scores(
        total["hits"] / (count * spec.top_k),
        total["exact"] / count,
        total["covered"] / count,
        total["square"] / (count * spec.num_experts),
        bins,
        first if predictor.begin is not None else None,
    )


def _run(predictor: Predictor, params: Any, spec: Spec, state: Any, activations: Activations) -> dict[str, jax.Array]:
    L, E, K, H = spec.num_layers, spec.num_experts, spec.top_k, spec.horizon
    W, _, T = activations.ids.shape[:3]
    # Steps s = t * L + l: the target of horizon h is step s + h, whether it wraps or not.
    steps = lambda x: jnp.moveaxis(jnp.asarray(x), (2, 1), (0, 1)).reshape(T * L, W, *x.shape[3:])
    residual, logits, ids, gates = (steps(x) for x in activations[1:5])
    ids = ids.astype(jnp.int32)
    future = jnp.concatenate([ids, jnp.full((H, W, K), -1, jnp.int32)])
    weights = jnp.concatenate([gates.astype(jnp.float32), jnp.zeros((H, W, K))])
    embedding = jnp.asarray(activations.embedding)
    shape = (L, H)
    zeros = {name: jnp.zeros(shape) for name in ("count", "hits", "exact", "covered", "square")}
    zeros |= {name: jnp.zeros((*shape, BINS)) for name in ("bin_probability", "bin_hits")}

    first_zeros = {"first_count": jnp.zeros(H), "first_hits": jnp.zeros(H)}

    def ahead(x, start):
        return jax.lax.dynamic_slice_in_dim(x, start, H).swapaxes(0, 1)  # [W, H, K]

    def before_layer_0(state, first, s):
        """What the predictor says of the token that enters, before any layer has seen it."""
        token = s // L
        assert predictor.begin is not None
        prediction, state = predictor.begin(
            params, state, embedding[:, token].astype(jnp.float32), activations.tokens[:, token]
        )
        ranked = jax.lax.top_k(prediction.probability, K)[1]
        hits = jnp.take_along_axis(multi_hot(ahead(future, s), E), ranked, axis=-1).sum(-1)
        counted = ((token < activations.lengths) & (token > 0))[:, None] * jnp.ones(H)
        return state, {
            "first_count": first["first_count"] + counted.sum(0),
            "first_hits": first["first_hits"] + (hits * counted).sum(0),
        }

    def step(carry, s):
        state, sums, first = carry
        token, layer = s // L, s % L
        if predictor.begin is not None:
            skip = lambda state, first, s: (state, first)
            state, first = jax.lax.cond(layer == 0, before_layer_0, skip, state, first, s)
        float32 = lambda x: x[s].astype(jnp.float32)
        features = Features(layer, float32(residual), float32(logits), ids[s], float32(gates))
        prediction, state = predictor.apply(params, state, features)
        probability = prediction.probability  # [W, H, E]
        true, gate = ahead(future, s + 1), ahead(weights, s + 1)  # [W, H, K]
        target_token = (s + 1 + jnp.arange(H)) // L
        counted = (target_token < activations.lengths[:, None]) & (token > 0)  # [W, H]
        wanted = multi_hot(true, E)
        ranked = jax.lax.top_k(probability, K)[1]
        hits = jnp.take_along_axis(wanted, ranked, axis=-1).sum(-1)
        found = jnp.take_along_axis(multi_hot(ranked, E), jnp.maximum(true, 0), axis=-1)  # [W, H, K] of the true ones
        covered = (found * gate).sum(-1) / jnp.maximum(gate.sum(-1), 1e-9)
        weight = counted[..., None].astype(jnp.float32)
        bins = jax.nn.one_hot(jnp.clip((probability * BINS).astype(jnp.int32), 0, BINS - 1), BINS) * weight[..., None]
        new = {
            "count": counted.sum(0),
            "hits": (hits * counted).sum(0),
            "exact": ((hits == K) * counted).sum(0),
            "covered": (covered * counted).sum(0),
            "square": ((probability - wanted) ** 2 * weight).sum((0, 2)),
            "bin_probability": (probability[..., None] * bins).sum((0, 2)),
            "bin_hits": (wanted[..., None] * bins).sum((0, 2)),
        }
        sums = {name: sums[name].at[layer].add(new[name]) for name in sums}
        return (state, sums, first), None

    _, sums, first = jax.lax.scan(step, (state, zeros, first_zeros), jnp.arange(T * L))[0]
    return sums | first

"""How good predictions are: recall@K, Brier score and calibration, per layer and horizon."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.prediction.activation_log import ActivationLog, Activations
from moe_jax.prediction.interface import Features, Predictor, Spec, multi_hot

BINS = 10


@dataclasses.dataclass(frozen=True)
class Scores:
    """Means over tokens, [L, H] each; column h - 1 is h layers ahead.

    Attributes:
      recall: share of the true top K among the K experts ranked first.
      brier: mean squared error of the probabilities, over experts.
      calibration_error: |mean probability - observed share|, averaged over ten bins by their weight.
    """

    recall: np.ndarray
    brier: np.ndarray
    calibration_error: np.ndarray

    def by_horizon(self, name: str, wrapped: bool) -> list[float | None]:
        """Mean over layers of one score at every horizon, over targets in the next token or only in the same one."""
        values = getattr(self, name)
        wraps = wrapped_targets(*values.shape)
        columns = [values[wraps[:, h] == wrapped, h] for h in range(values.shape[1])]
        return [float(column.mean()) if len(column) else None for column in columns]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: [L][H] lists, and means by horizon with wrapped targets apart."""
        result: dict[str, Any] = {}
        for name in ("recall", "brier", "calibration_error"):
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
    batch: int = 32,
) -> Scores:
    """Runs `apply` over logged windows token by token and layer by layer, exactly as a decode loop would.

    The first token of a window, of which a predictor with a memory knows nothing, is not counted; nor is what lies
    beyond a window's end.
    """
    rows = np.arange(len(log.windows.tokens)) if windows is None else np.asarray(windows)
    state = predictor.init_state(spec, batch)
    run = jax.jit(lambda state, activations: _run(predictor, params, spec, state, activations))
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
    return Scores(total["hits"] / (count * spec.top_k), total["square"] / (count * spec.num_experts), bins)


def _run(predictor: Predictor, params: Any, spec: Spec, state: Any, activations: Activations) -> dict[str, jax.Array]:
    L, E, K, H = spec.num_layers, spec.num_experts, spec.top_k, spec.horizon
    W, _, T = activations.ids.shape[:3]
    # Steps s = t * L + l: the target of horizon h is step s + h, whether it wraps or not.
    steps = lambda x: jnp.moveaxis(jnp.asarray(x), (2, 1), (0, 1)).reshape(T * L, W, *x.shape[3:])
    residual, logits, ids, gates = (steps(x) for x in activations[:4])
    ids = ids.astype(jnp.int32)
    future = jnp.concatenate([ids, jnp.full((H, W, K), -1, jnp.int32)])
    shape = (L, H)
    zeros = {name: jnp.zeros(shape) for name in ("count", "hits", "square")}
    zeros |= {name: jnp.zeros((*shape, BINS)) for name in ("bin_probability", "bin_hits")}

    def step(carry, s):
        state, sums = carry
        token, layer = s // L, s % L
        float32 = lambda x: x[s].astype(jnp.float32)
        features = Features(layer, float32(residual), float32(logits), ids[s], float32(gates))
        prediction, state = predictor.apply(params, state, features)
        probability = prediction.probability  # [W, H, E]
        true = jax.lax.dynamic_slice_in_dim(future, s + 1, H).swapaxes(0, 1)  # [W, H, K]
        target_token = (s + 1 + jnp.arange(H)) // L
        counted = (target_token < activations.lengths[:, None]) & (token > 0)  # [W, H]
        wanted = multi_hot(true, E)
        ranked = jax.lax.top_k(probability, K)[1]
        hits = jnp.take_along_axis(wanted, ranked, axis=-1).sum(-1)
        weight = counted[..., None].astype(jnp.float32)
        bins = jax.nn.one_hot(jnp.clip((probability * BINS).astype(jnp.int32), 0, BINS - 1), BINS) * weight[..., None]
        new = {
            "count": counted.sum(0),
            "hits": (hits * counted).sum(0),
            "square": ((probability - wanted) ** 2 * weight).sum((0, 2)),
            "bin_probability": (probability[..., None] * bins).sum((0, 2)),
            "bin_hits": (wanted[..., None] * bins).sum((0, 2)),
        }
        sums = {name: sums[name].at[layer].add(new[name]) for name in sums}
        return (state, sums), None

    return jax.lax.scan(step, (state, zeros), jnp.arange(T * L))[0][1]

"""The learned predictor: a small network per layer, whose tables all layers share one executable for.

A layer's network reads the normalised residual, the current gates and the experts that the last token used in the
target layers. Its direct part is one matrix per horizon, which starts as the router look-ahead of the target layer and
is then solved for (`fit.least_squares`); a small hidden layer corrects it. A table per layer costs no more compute than
a shared trunk of the same width, and little memory while the network is small.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.model.architecture import Routing
from moe_jax.prediction.activation_log import Activations
from moe_jax.prediction.interface import Array, Features, ModelParts, Prediction, Spec, last_ids, multi_hot, targets


class Network(nnx.Module):
    """The network of one layer. Weights are `[in, out]`; the last axis of an output is (horizon, expert), flattened."""

    def __init__(self, spec: Spec, hidden: int, *, rngs: nnx.Rngs):
        D, E, H = spec.d_model, spec.num_experts, spec.horizon
        fan_in = D + E + H * E
        self.residual = nnx.Param(jnp.zeros((D, H * E)))
        self.gates = nnx.Param(jnp.zeros((E, H * E)))
        self.previous = nnx.Param(jnp.zeros((H, E, E)))  # a target layer's last experts speak for that layer only
        self.bias = nnx.Param(jnp.zeros((H * E,)))
        self.hidden_in = nnx.Param(jax.random.normal(rngs.params(), (fan_in, hidden)) / math.sqrt(D))
        self.hidden_bias = nnx.Param(jnp.zeros((hidden,)))
        self.hidden_out = nnx.Param(jnp.zeros((hidden, H * E)))
        self.scale = nnx.Param(jnp.ones((H, 1)))
        self.shift = nnx.Param(jnp.zeros((H, 1)))

    def __call__(self, x: jax.Array, gates: jax.Array, previous: jax.Array, top_k: int) -> jax.Array:
        """Logits of membership in the true top K.

        Args:
          x: normalised residual, float32 [R, D].
          gates: of the chosen experts, 0 elsewhere, [R, E].
          previous: multi-hot experts of the last token in the target layers, [R, H, E].

        Returns:
          Float32 [R, H, E].
        """
        rows, flat = x.shape[0], previous.reshape(x.shape[0], -1)
        hidden = jnp.concatenate([x, gates, flat], axis=-1) @ self.hidden_in[...] + self.hidden_bias[...]
        out = x @ self.residual[...] + gates @ self.gates[...] + jax.nn.gelu(hidden) @ self.hidden_out[...]
        out = (out + self.bias[...]).reshape(rows, *previous.shape[1:])
        out = out + jnp.einsum("rhe,hef->rhf", previous, self.previous[...])
        # Membership depends on how far a logit lies above or below the boundary between the K-th and the next one.
        return (out - jax.lax.stop_gradient(boundary(out, top_k))) * self.scale[...] + self.shift[...]


def boundary(logits: jax.Array, top_k: int) -> jax.Array:
    """Midway between the K-th and the (K + 1)-th largest of the last axis, which is kept: [..., 1]."""
    # Repeated maxima: on a CPU a sort of many short rows takes several times as long.
    rest = logits
    largest = rest.max(-1, keepdims=True)
    for _ in range(top_k - 1):
        rest = jnp.where(rest >= largest, -jnp.inf, rest)
        largest = rest.max(-1, keepdims=True)
    following = jnp.where(rest >= largest, -jnp.inf, rest).max(-1, keepdims=True)
    # Ties, or no further expert: the boundary is the K-th itself.
    following = jnp.where(jnp.isfinite(following), following, largest)
    return jnp.where(jnp.isfinite(largest), (largest + following) / 2, logits.min(-1, keepdims=True))


def _graph() -> Any:
    # The structure has no sizes in it, so that of the smallest network serves all.
    tiny = Spec(num_layers=1, num_experts=1, d_model=1, norm_eps=0.0, horizon=1, routing=Routing(top_k=1))
    return nnx.graphdef(nnx.eval_shape(lambda: Network(tiny, 1, rngs=nnx.Rngs(0))))


class Learned:
    """The predictor around the network. State: the experts that the last token used in each layer, int32 [B, L, K]."""

    name = "learned"
    begin = None

    def __init__(self, hidden: int = 24):
        self.hidden = hidden
        self._graph = _graph()

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        """Untrained parameters, which give the router look-ahead. `network` holds tables stacked over layers."""
        make = lambda key: nnx.to_pure_dict(nnx.split(Network(spec, self.hidden, rngs=nnx.Rngs(params=key)))[1])
        network = jax.vmap(make)(jax.random.split(rng, spec.num_layers))
        ahead = (np.arange(spec.num_layers)[:, None] + np.arange(1, spec.horizon + 1)) % spec.num_layers
        routers = (parts.routers * parts.expert_norms[:, None])[ahead]  # [L, H, E, D]
        network["residual"] = jnp.asarray(routers.reshape(spec.num_layers, -1, spec.d_model).swapaxes(1, 2))
        return {"network": network, "eps": jnp.float32(spec.norm_eps)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return {"last": jnp.full((batch, spec.num_layers, spec.top_k), -1, jnp.int32)}

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        return {"last": jnp.asarray(last_ids(ids))}

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        tables = jax.tree.map(lambda table: table[features.layer], params["network"])
        H, E = tables["previous"].shape[:2]
        last = state["last"].at[:, features.layer].set(features.ids)
        ahead = targets(jnp.arange(1, H + 1, dtype=jnp.int32), features.layer, last.shape[1])
        gates = (jax.nn.one_hot(features.ids, E) * features.gates[..., None]).sum(-2)
        x = normalise(features.residual, params["eps"])
        logits = nnx.merge(self._graph, tables)(x, gates, multi_hot(last[:, ahead], E), features.ids.shape[1])
        # What tells members from the rest has about the scale of the router's own logits.
        return Prediction(jax.nn.sigmoid(logits), logits), {"last": last}

    @staticmethod
    def multiply_adds(params: Any) -> int:
        """Multiply-adds of one layer's call for one token."""
        return sum(table[0].size for name, table in params["network"].items() if table.ndim > 2)

    def score_windows(self, network: Any, inputs: tuple[jax.Array, jax.Array, jax.Array], top_k: int) -> jax.Array:
        """Logits for whole windows, [L, R, H, E], as `apply` gives them; `inputs` are those of `window_inputs`."""
        return jax.vmap(lambda tables, *xs: nnx.merge(self._graph, tables)(*xs, top_k))(network, *inputs)


def normalise(residual: Array, eps: Any) -> jax.Array:
    """RMS norm without a weight, float32."""
    x = jnp.asarray(residual, jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def window_inputs(eps: Any, a: Activations, horizon: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The network's inputs for windows of a log: x [L, R, D], gates [L, R, E], previous [L, R, H, E].

    R = W * T; `previous` of a window's first token is zero.
    """
    L, E = a.logits.shape[1], a.logits.shape[-1]
    rows = lambda x: jnp.swapaxes(x, 0, 1).reshape(L, -1, *x.shape[3:])
    one_hot = jax.nn.one_hot(a.ids.astype(jnp.int32), E)
    gates = (one_hot * a.gates.astype(jnp.float32)[..., None]).sum(-2)
    used = one_hot.sum(-2)
    before = jnp.pad(used, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    # A wrapped target belongs to the next token: its last token is this one.
    previous = ahead(before, used, horizon)
    return rows(normalise(a.residual, eps)), rows(gates), rows(previous)


def window_targets(values: jax.Array, lengths: jax.Array, horizon: int) -> tuple[jax.Array, jax.Array]:
    """What is to be predicted of per-layer `values` [W, L, T, E]: [L, R, H, E], and whether it is in the window.

    The second is bool [L, R, H]: false after a window's end, and where the next token would be needed and is not there.
    """
    W, L, T, E = values.shape
    following = jnp.pad(values, ((0, 0), (0, 0), (0, 1), (0, 0)))[:, :, 1:]
    wraps = (jnp.arange(L)[:, None] + jnp.arange(1, horizon + 1)) >= L  # [L, H]
    known = (jnp.arange(T)[None, :, None] + wraps[:, None, None, :]) < lengths[:, None, None]  # [L, W, T, H]
    wanted = jnp.swapaxes(ahead(values, following, horizon), 0, 1)
    return wanted.reshape(L, W * T, horizon, E), known.reshape(L, W * T, horizon)


def ahead(this: jax.Array, following: jax.Array, horizon: int) -> jax.Array:
    """[W, L, T, E] of this token and of the next pass over the layers: [W, L, T, H, E] for the layers ahead."""
    L, both = this.shape[1], jnp.concatenate([this, following], axis=1)
    return jnp.stack([both[:, h : h + L] for h in range(1, horizon + 1)], axis=3)

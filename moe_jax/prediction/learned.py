"""The learned predictor: a small network per place, whose tables all places share one executable for.

Place 0 is the token's embedding, before layer 0; place l + 1 is layer l, after its router. A place's network reads the
normalised residual (or embedding), the current gates, the experts that the last token used in the target layers, and
the *echo* of the target layers: what each of them, when the last token passed it, left for the next one to add to its
scores. Attention makes much of the last token, so that this is worth more than anything else but the residual.

The direct part is one matrix per horizon, which starts as the router look-ahead of the target layer and is then solved
for (`fit.least_squares`); a small hidden layer corrects it. A table per place costs no more compute than a shared trunk
of the same width, and little memory while the network is small.
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
    """The network of one place. Weights are `[in, out]`; the last axis of an output is (horizon, expert), flattened."""

    def __init__(self, spec: Spec, hidden: int, *, rngs: nnx.Rngs):
        D, E, H = spec.d_model, spec.num_experts, spec.horizon
        fan_in = D + E + H * E
        self.residual = nnx.Param(jnp.zeros((D, H * E)))
        self.gates = nnx.Param(jnp.zeros((E, H * E)))
        self.previous = nnx.Param(jnp.zeros((H, E, E)))  # a target layer's last experts speak for that layer only
        self.echo = nnx.Param(jnp.zeros((D, H * E)))  # of this layer, for the next token's predictions of it
        self.echo_bias = nnx.Param(jnp.zeros((H * E,)))
        self.bias = nnx.Param(jnp.zeros((H * E,)))
        self.hidden_in = nnx.Param(jax.random.normal(rngs.params(), (fan_in, hidden)) / math.sqrt(D))
        self.hidden_bias = nnx.Param(jnp.zeros((hidden,)))
        self.hidden_out = nnx.Param(jnp.zeros((hidden, H * E)))
        self.scale = nnx.Param(jnp.ones((H, 1)))
        self.shift = nnx.Param(jnp.zeros((H, 1)))

    def leave(self, x: jax.Array) -> jax.Array:
        """The echo of this layer, [..., H, E] of x [..., D]: horizon h is for a prediction made h layers before it."""
        left = x @ self.echo[...] + self.echo_bias[...]
        return left.reshape(*x.shape[:-1], self.scale.shape[0], -1)

    def __call__(self, x: jax.Array, gates: jax.Array, previous: jax.Array, echo: jax.Array, top_k: int) -> jax.Array:
        """Logits of membership in the true top K.

        Args:
          x: normalised residual, float32 [R, D].
          gates: of the chosen experts, 0 elsewhere, [R, E].
          previous: multi-hot experts of the last token in the target layers, [R, H, E].
          echo: what the target layers left, [R, H, E].

        Returns:
          Float32 [R, H, E].
        """
        rows, flat = x.shape[0], previous.reshape(x.shape[0], -1)
        hidden = jnp.concatenate([x, gates, flat], axis=-1) @ self.hidden_in[...] + self.hidden_bias[...]
        out = x @ self.residual[...] + gates @ self.gates[...] + jax.nn.gelu(hidden) @ self.hidden_out[...]
        out = (out + self.bias[...]).reshape(rows, *previous.shape[1:])
        out = out + jnp.einsum("rhe,hef->rhf", previous, self.previous[...]) + echo
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
    """The predictor around the network. State: of every layer, the experts that the last token used, int32 [B, L, K],
    and what it left, float32 [B, L, H, E] (zero while unknown: after a prompt)."""

    name = "learned"

    def __init__(self, hidden: int = 24):
        self.hidden = hidden
        self._graph = _graph()

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        """Untrained parameters, which give the router look-ahead. `network` holds tables stacked over L + 1 places."""
        make = lambda key: nnx.to_pure_dict(nnx.split(Network(spec, self.hidden, rngs=nnx.Rngs(params=key)))[1])
        network = jax.vmap(make)(jax.random.split(rng, spec.num_layers + 1))
        ahead = (np.arange(spec.num_layers + 1)[:, None] + np.arange(spec.horizon)) % spec.num_layers
        routers = (parts.routers * parts.expert_norms[:, None])[ahead]  # [L + 1, H, E, D]
        network["residual"] = jnp.asarray(routers.reshape(spec.num_layers + 1, -1, spec.d_model).swapaxes(1, 2))
        return {"network": network, "eps": jnp.float32(spec.norm_eps)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return self.prime(spec, np.full((spec.num_layers, batch, 1, spec.top_k), -1))

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        echo = jnp.zeros((ids.shape[1], spec.num_layers, spec.horizon, spec.num_experts))
        return {"last": jnp.asarray(last_ids(ids)), "echo": echo}

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        network = self._network(params, features.layer + 1)
        x = normalise(features.residual, params["eps"])
        state = {
            "last": state["last"].at[:, features.layer].set(features.ids),
            "echo": state["echo"].at[:, features.layer].set(network.leave(x)),
        }
        gates = (jax.nn.one_hot(features.ids, state["echo"].shape[-1]) * features.gates[..., None]).sum(-2)
        return self._predict(network, state, features.layer, x, gates), state

    def begin(self, params: Any, state: Any, embedding: jax.Array) -> tuple[Prediction, Any]:
        x = normalise(embedding, params["eps"])
        gates = jnp.zeros((x.shape[0], state["echo"].shape[-1]))
        return self._predict(self._network(params, 0), state, -1, x, gates), state

    def _network(self, params: Any, place: Any) -> Network:
        return nnx.merge(self._graph, jax.tree.map(lambda table: table[place], params["network"]))

    def _predict(self, network: Network, state: Any, layer: Any, x: jax.Array, gates: jax.Array) -> Prediction:
        (_, L, K), (H, E) = state["last"].shape, state["echo"].shape[2:]
        ahead = targets(jnp.arange(1, H + 1, dtype=jnp.int32), layer, L)
        echo = state["echo"][:, ahead, jnp.arange(H)]
        logits = network(x, gates, multi_hot(state["last"][:, ahead], E), echo, K)
        # What tells members from the rest has about the scale of the router's own logits.
        return Prediction(jax.nn.sigmoid(logits), logits)

    @staticmethod
    def multiply_adds(params: Any) -> int:
        """Multiply-adds of one place's call for one token."""
        return sum(table[0].size for name, table in params["network"].items() if table.ndim > 2)

    def score_windows(self, network: Any, inputs: tuple[jax.Array, jax.Array, jax.Array], top_k: int) -> jax.Array:
        """Logits for whole windows, [P, W * T, H, E], as `apply` and `begin` give them; inputs as `window_inputs`'."""
        x, gates, previous = inputs
        P, W, T = x.shape[:3]
        merge = lambda tables: nnx.merge(self._graph, tables)
        left = jax.vmap(lambda tables, x: merge(tables).leave(x))(network, x)[1:]  # [L, W, T, H, E]
        before = jnp.pad(left, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))[:, :, :-1]
        both = jnp.concatenate([before, left])
        echo = jnp.stack([both[h : h + P, :, :, h] for h in range(left.shape[3])], axis=3)
        rows = lambda z: z.reshape(P, W * T, *z.shape[3:])
        call = lambda tables, *xs: merge(tables)(*xs, top_k)
        return jax.vmap(call)(network, rows(x), rows(gates), rows(previous), rows(echo))


def normalise(residual: Array, eps: Any) -> jax.Array:
    """RMS norm without a weight, float32."""
    x = jnp.asarray(residual, jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def window_inputs(eps: Any, a: Activations, horizon: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The network's inputs for windows of a log, by place P = L + 1: x [P, W, T, D], gates [P, W, T, E] and previous
    [P, W, T, H, E], which is zero for a window's first token."""
    E = a.logits.shape[-1]
    by_layer = lambda x: jnp.swapaxes(x, 0, 1)
    one_hot = jax.nn.one_hot(by_layer(a.ids).astype(jnp.int32), E)
    gates = (one_hot * by_layer(a.gates).astype(jnp.float32)[..., None]).sum(-2)
    used = one_hot.sum(-2)  # [L, W, T, E]
    before = jnp.pad(used, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    x = jnp.concatenate([a.embedding[None], by_layer(a.residual)])
    # A wrapped target belongs to the next token: its last token is this one.
    return normalise(x, eps), jnp.pad(gates, ((1, 0), (0, 0), (0, 0), (0, 0))), ahead(before, used, horizon)


def window_targets(values: jax.Array, lengths: jax.Array, horizon: int) -> tuple[jax.Array, jax.Array]:
    """What is to be predicted of per-layer `values` [W, L, T, E]: [P, W * T, H, E], and whether it is in the window.

    The second is bool [P, W * T, H]: false after a window's end, and where the next token would be needed and is not
    there.
    """
    W, L, T, E = values.shape
    this = jnp.swapaxes(values, 0, 1)
    following = jnp.pad(this, ((0, 0), (0, 0), (0, 1), (0, 0)))[:, :, 1:]
    wraps = (jnp.arange(L + 1)[:, None] + jnp.arange(horizon)) >= L  # [P, H]
    known = (jnp.arange(T)[None, :, None] + wraps[:, None, None, :]) < lengths[:, None, None]  # [P, W, T, H]
    wanted = ahead(this, following, horizon)
    return wanted.reshape(L + 1, W * T, horizon, E), known.reshape(L + 1, W * T, horizon)


def ahead(this: jax.Array, following: jax.Array, horizon: int) -> jax.Array:
    """[L, W, T, E] of this token and of the next pass over the layers: [P, W, T, H, E] for the layers ahead."""
    places, both = len(this) + 1, jnp.concatenate([this, following])
    return jnp.stack([both[h : h + places] for h in range(horizon)], axis=3)

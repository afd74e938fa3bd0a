"""The learned predictor: a small network per place, whose tables all places share one executable for.

Place 0 is the token's embedding, before layer 0; place l + 1 is layer l, after its router. A place's network reads the
normalised residual (or embedding), the chosen experts with their gates, the experts that the last token used in the
target layers, and the *echo* of the target layers: a few numbers that each of them, when the last token passed it, left
for the next one. Attention makes much of the last token, so that this is worth more than all else but the residual.

What the chosen experts are about to add to the residual is what a look-ahead lacks most: a regression that is told it
finds 2 to 6 points more of the next layer's experts. So every expert has a small hidden layer of its own, and only
those of the K chosen ones are computed.

The direct part (full matrices for the next two layers, one of low rank for all of them, and the echo) is solved for
(`closed_form.py`); the hidden layers correct it. A table per place costs no more compute than a shared trunk of the
same width, and little memory while the network is small.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.model.architecture import Routing
from moe_jax.prediction.activation_log import Activations
from moe_jax.prediction.interface import Array, Features, ModelParts, Prediction, Spec, last_ids, targets

NEAR = 2  # horizons with a direct part of full rank: the nearer a target, the more directions tell its experts apart


def rank(spec: Spec) -> int:
    """Rank of the direct part for all horizons and width of the echo: no less than what a small model needs, and for
    large ones what keeps the network under 3% of their multiply-adds."""
    return min(spec.d_model, max(48, spec.d_model // 16))


class Network(nnx.Module):
    """The network of one place. Weights are `[in, out]`; the last axis of an output is (horizon, expert), flattened."""

    def __init__(self, spec: Spec, hidden: int, expert_hidden: int, *, rngs: nnx.Rngs):
        D, E, H, r = spec.d_model, spec.num_experts, spec.horizon, rank(spec)
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape))
        normal = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape) / math.sqrt(D))
        self.near = zeros(D, min(NEAR, H) * E)  # the next layers only
        self.far_in, self.far_out = zeros(D, r), zeros(r, H * E)
        self.gates = zeros(E, H * E)
        self.previous = zeros(H, E, E)  # a target layer's last experts speak for that layer only
        self.echo_in, self.echo_bias = zeros(D, r), zeros(r)  # what this layer leaves
        self.echo_out = zeros(H, r, E)  # what it makes of what the target layers left
        self.bias = zeros(H * E)
        self.hidden_in, self.hidden_bias = normal(D, hidden), zeros(hidden)
        self.hidden_out = zeros(hidden, H * E)
        self.expert_in, self.expert_bias = normal(E, D, expert_hidden), zeros(E, expert_hidden)
        self.expert_out = zeros(E, expert_hidden, H * E)
        self.scale, self.shift = nnx.Param(jnp.ones((H, 1))), zeros(H, 1)

    def leave(self, x: jax.Array) -> jax.Array:
        """The echo of this layer, [..., rank] of x [..., D]."""
        return x @ self.echo_in[...] + self.echo_bias[...]

    def of_chosen(self, x: jax.Array, ids: Array, gates: Array) -> jax.Array:
        """What the chosen experts say, [R, H * E]: x [R, D], ids [R, K] (-1: none), gates [R, K] (0 where none)."""
        inner = jnp.einsum("rd,rkdm->rkm", x, self.expert_in[...][ids]) + self.expert_bias[...][ids]
        out = jnp.einsum("rkm,rkmo->rko", jax.nn.gelu(inner), self.expert_out[...][ids]) + self.gates[...][ids]
        return jnp.einsum("rko,rk->ro", out, gates)

    def of_all(self, x: jax.Array, gates: jax.Array) -> jax.Array:
        """The same for gates [R, E] that are 0 for all but the chosen experts: many rows share the tables."""
        inner = jnp.einsum("rd,edm->rem", x, self.expert_in[...]) + self.expert_bias[...]
        inner = jax.nn.gelu(inner) * gates[..., None]
        return jnp.einsum("rem,emo->ro", inner, self.expert_out[...]) + gates @ self.gates[...]

    def __call__(self, x: jax.Array, of_experts: jax.Array, previous: jax.Array, echo: jax.Array) -> jax.Array:
        """Estimates of the target layers' router logits.

        Args:
          x: normalised residual, float32 [R, D].
          of_experts: what `of_chosen` or `of_all` says, [R, H * E].
          previous: what the last token's experts in the target layers say, [R, H, E]: sums of rows of their tables.
          echo: what the target layers left, [R, H, rank].

        Returns:
          Float32 [R, H, E].
        """
        far = x @ self.far_in[...] @ self.far_out[...]
        hidden = jax.nn.gelu(x @ self.hidden_in[...] + self.hidden_bias[...]) @ self.hidden_out[...]
        out = (far + hidden + of_experts + self.bias[...]).reshape(previous.shape)
        near = (x @ self.near[...]).reshape(len(x), -1, out.shape[-1])
        out = out.at[:, : near.shape[1]].add(near)
        return out + previous + jnp.einsum("rhk,hke->rhe", echo, self.echo_out[...])

    def margins(self, logits: jax.Array, top_k: int) -> jax.Array:
        """Logits of membership in the true top K out of estimated router logits [..., H, E]."""
        # Membership depends on how far a logit lies above or below the boundary between the K-th and the next one.
        return (logits - jax.lax.stop_gradient(boundary(logits, top_k))) * self.scale[...] + self.shift[...]


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
    return nnx.graphdef(nnx.eval_shape(lambda: Network(tiny, 1, 1, rngs=nnx.Rngs(0))))


class Learned:
    """The predictor around the network. State: of every layer, the experts that the last token used, int32 [B, L, K],
    and what it left, float32 [B, L, rank] (zero while unknown: after a prompt)."""

    name = "learned"

    def __init__(self, hidden: int = 16, expert_hidden: int = 8):
        """Widths of the hidden layer that every token uses and of every expert's own, of what `init` makes."""
        self.hidden, self.expert_hidden = hidden, expert_hidden
        self._graph = _graph()

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        """Untrained parameters, which say nothing. `network` holds tables stacked over L + 1 places."""
        make = lambda key: nnx.to_pure_dict(
            nnx.split(Network(spec, self.hidden, self.expert_hidden, rngs=nnx.Rngs(params=key)))[1]
        )
        network = jax.vmap(make)(jax.random.split(rng, spec.num_layers + 1))
        return {"network": network, "eps": jnp.float32(spec.norm_eps)}

    def init_state(self, spec: Spec, batch: int) -> Any:
        return self.prime(spec, np.full((spec.num_layers, batch, 1, spec.top_k), -1))

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        echo = jnp.zeros((ids.shape[1], spec.num_layers, rank(spec)))
        return {"last": jnp.asarray(last_ids(ids)), "echo": echo}

    def at(self, params: Any, layer: Any) -> Any:
        """The parameters of one layer's place, layer int or int32 [] from -1; `apply` takes them too."""
        return params | {"network": jax.tree.map(lambda table: table[layer + 1], params["network"])}

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        if params["network"]["bias"].ndim > 1:  # of all places
            params = self.at(params, features.layer)
        network = nnx.merge(self._graph, params["network"])
        x = normalise(features.residual, params["eps"])
        state = {
            "last": state["last"].at[:, features.layer].set(features.ids),
            "echo": state["echo"].at[:, features.layer].set(network.leave(x)),
        }
        of_experts = network.of_chosen(x, features.ids, features.gates)
        return self._predict(network, state, features.layer, x, of_experts), state

    def begin(self, params: Any, state: Any, embedding: jax.Array) -> tuple[Prediction, Any]:
        network, x = nnx.merge(self._graph, self.at(params, -1)["network"]), normalise(embedding, params["eps"])
        return self._predict(network, state, -1, x, jnp.zeros((len(x), network.bias.shape[0]))), state

    def _predict(self, network: Network, state: Any, layer: Any, x: jax.Array, of_experts: jax.Array) -> Prediction:
        H, (_, L, K) = network.scale.shape[0], state["last"].shape
        ahead = targets(jnp.arange(1, H + 1, dtype=jnp.int32), layer, L)
        last = state["last"][:, ahead]  # [B, H, K]
        rows = network.previous[...][jnp.arange(H)[:, None], last]  # [B, H, K, E]
        previous = (rows * (last >= 0)[..., None]).sum(-2)
        logits = network(x, of_experts, previous, state["echo"][:, ahead])
        return Prediction(jax.nn.sigmoid(network.margins(logits, K)), logits)

    def multiply_adds(self, spec: Spec) -> int:
        """Multiply-adds of one place's call for one token; tables of experts are looked up, not multiplied."""
        D, E, K, out = spec.d_model, spec.num_experts, spec.top_k, spec.horizon * spec.num_experts
        through = 2 * rank(spec) + self.hidden + K * self.expert_hidden  # numbers between x and the outputs
        return D * min(NEAR, spec.horizon) * E + through * (D + out) + 2 * K * out

    def score_windows(self, network: Any, inputs: Inputs, top_k: int) -> tuple[jax.Array, jax.Array]:
        """Estimated router logits and logits of membership for whole windows, [P, W * T, H, E] each, as `apply` and
        `begin` give them."""
        P, W, T, D = inputs.x.shape
        merge = lambda tables: nnx.merge(self._graph, tables)
        left = jax.vmap(lambda tables, x: merge(tables).leave(x))(network, inputs.x)[1:]  # [L, W, T, rank]
        echo = ahead(before(left), left, inputs.previous.shape[3])
        rows = lambda z: z.reshape(P, W * T, *z.shape[3:])

        def call(tables, x, gates, used, echo):
            place = merge(tables)
            previous = jnp.einsum("rhe,hef->rhf", used, place.previous[...])
            logits = place(x, place.of_all(x, gates), previous, echo)
            return logits, place.margins(logits, top_k)

        return jax.vmap(call)(network, rows(inputs.x), rows(inputs.gates), rows(inputs.previous), rows(echo))


def normalise(residual: Array, eps: Any) -> jax.Array:
    """RMS norm without a weight, float32."""
    x = jnp.asarray(residual, jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class Inputs(NamedTuple):
    """What the network reads of windows of a log, by place P = L + 1, float32."""

    x: jax.Array  # [P, W, T, D] normalised residuals
    gates: jax.Array  # [P, W, T, E]
    previous: jax.Array  # [P, W, T, H, E] multi-hot experts of the last token in the target layers, or none


def window_inputs(eps: Any, a: Activations, horizon: int) -> Inputs:
    """The network's inputs; a window's first token knows no last one."""
    E = a.logits.shape[-1]
    by_layer = lambda x: jnp.swapaxes(x, 0, 1)
    one_hot = jax.nn.one_hot(by_layer(a.ids).astype(jnp.int32), E)
    gates = (one_hot * by_layer(a.gates).astype(jnp.float32)[..., None]).sum(-2)
    used = one_hot.sum(-2)  # [L, W, T, E]
    x = normalise(jnp.concatenate([a.embedding[None], by_layer(a.residual)]), eps)
    # A wrapped target belongs to the next token: its last token is this one.
    return Inputs(x, jnp.pad(gates, ((1, 0), (0, 0), (0, 0), (0, 0))), ahead(before(used), used, horizon))


def before(this: jax.Array) -> jax.Array:
    """[L, W, T, ...] of the token before, zero for a window's first."""
    return jnp.pad(this, ((0, 0), (0, 0), (1, 0), *[(0, 0)] * (this.ndim - 3)))[:, :, :-1]


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
    """[L, W, T, E] for targets in this token and in the next one: [P, W, T, H, E] for the layers ahead."""
    places, both = len(this) + 1, jnp.concatenate([this, following])
    return jnp.stack([both[h : h + places] for h in range(horizon)], axis=3)

"""The learned predictor: a running estimate of every layer's router logits, which tables start and each layer corrects.

When a token enters, rows of tables, its own and the last token's, give a first estimate for all layers (`begin`): which
experts a token takes depends mostly on what the token is, and a table can be looked up without a multiplication. Every
layer then corrects the estimates of a few layers ahead: through the residual those of `READ`, of full rank, and through
what its own router said that the tables had not expected those of `NEWS`. A target is so refined several times before
it is reached, and what a layer has read serves all that come between.

What attention will make of the last token in a layer is its *echo*, a part of what that token left there. What
the chosen experts are about to add is looked up in tables, but that for the next layer each of them has a small hidden
layer of its own. For the next token's layers, as long as it is not known, there is a table of what follows a token.

Estimates stand in the order in which their layers are reached, so that nothing is looked up by layer, and a call reads
the tables of one layer alone (`at`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model.architecture import Routing
from moe_jax.prediction.activation_log import Activations
from moe_jax.prediction.interface import Array, Features, ModelParts, Prediction, Rule, Spec
from moe_jax.prediction.membership import evidence

READ = (1, 3)
"""Layers ahead for which a layer reads the residual, through as many directions as there are experts."""
NEWS = (4, 8)
"""Further ones, which are corrected by what the router's logits say."""
BY_LAYER = (
    "read",
    "centre",
    "mix",
    "gates",
    "bias",
    "keep",
    "echo",
    "expert_in",
    "expert_bias",
    "expert_out",
    "correction",
)


def ahead_of(num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`READ` and `NEWS` of a model: what lies further than it has layers is left out, but that news need a target."""
    news = dict.fromkeys(min(h, num_layers) for h in NEWS)
    return tuple(h for h in READ if h <= num_layers), tuple(news)


class Learned:
    """State: float32 [B, 5, L, E]. Of the layers ahead, the one that is reached next first: estimates of their router
    logits, their echoes, what the tables said of them, what they say of them at the next token, and what they will add
    to that. All zero, which is about their mean, while nothing is known: after a prompt.

    Args:
      expert_hidden: width of every expert's hidden layer.
      tokens: tokens that have rows of their own; all others share the first row.
    """

    name = "learned"

    def __init__(self, expert_hidden: int = 1, tokens: int = 1):
        self.expert_hidden, self.tokens = expert_hidden, tokens

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        """Untrained parameters, which say nothing.

        Corrections stand in the order `READ`, `NEWS`; last comes the estimate for this layer at the next token.
        """
        D, E, L, m, zeros = spec.d_model, spec.num_experts, spec.num_layers, self.expert_hidden, jnp.zeros
        R, N = map(len, ahead_of(L))
        network = {
            "row": zeros(1, jnp.int32),  # of every token; 0 for those beyond its end
            "tokens": zeros((1 + self.tokens, 3, L, E)),  # for this token, the next one, and the next one unknown
            "begin_keep": zeros((L, E)),  # how much of the estimate that the last token left is kept
            "read": zeros((L, D, R * E)),
            "centre": zeros((L, R * E)),  # makes what is read zero for the mean
            "mix": zeros((L, E, N * E)),
            "gates": zeros((L, E, (R + N + 1) * E)),  # rows of the chosen experts
            "bias": zeros((L, (R + N + 1) * E)),
            "keep": jnp.ones((L, R + N, E)),  # how much of an estimate is kept when it is corrected
            "echo": zeros((L, E, E)),  # of what is read for the next layer
            "expert_in": jax.random.normal(rng, (L, E, D, m)) / np.sqrt(D),
            "expert_bias": zeros((L, E, m)),
            "expert_out": zeros((L, E, m, E)),
            "scale": jnp.ones((L + 1, spec.horizon)),  # place 0 is before layer 0, place l + 1 is layer l
            "shift": zeros((L + 1, spec.horizon)),
        }
        if spec.routing.correction_bias:  # not trained: the model's own
            network["correction"] = zeros((L, E)) if parts.corrections is None else jnp.asarray(parts.corrections)
        return params_of(network, spec)

    def init_state(self, spec: Spec, batch: int) -> Any:
        return jnp.zeros((batch, 5, spec.num_layers, spec.num_experts))

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        return self.init_state(spec, ids.shape[1])

    def at(self, params: Any, layer: Any) -> Any:
        """The part of the parameters that `apply` reads at layer int or int32 []; `apply` takes it in their stead."""
        network = params["network"]
        here = {name: network[name][layer] for name in BY_LAYER if name in network}
        here |= {name: network[name][layer + 1] for name in ("scale", "shift")}
        return params | {"network": here}

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        if params["network"]["bias"].ndim == 2:
            params = self.at(params, features.layer)
        own, (*_, base, guess, after) = params["network"], jnp.unstack(state, axis=1)
        gates, ids = features.gates, features.ids
        x = normalise(features.residual, params["eps"])
        read = x @ own["read"] + own["centre"]
        told = centred(ranked_by(features.logits, own, params["rule"].routing))
        news = (told - base[:, 0]) @ own["mix"]
        of_gates = jnp.einsum("bk,bko->bo", gates, own["gates"][ids])
        inner = jnp.einsum("bd,bkdm->bkm", x, own["expert_in"][ids]) + own["expert_bias"][ids]
        of_experts = jnp.einsum("bk,bkm,bkme->be", gates, jax.nn.gelu(inner), own["expert_out"][ids])
        said = jnp.concatenate([read, news, jnp.zeros_like(base[:, 0])], axis=-1) + of_gates + own["bias"]
        *corrections, first = jnp.split(said, said.shape[-1] // state.shape[-1], axis=-1)
        # This layer's own are used up, and make room for those of the next token.
        left = [first + guess[:, 0], read[:, : state.shape[-1]] @ own["echo"], base[:, 0], guess[:, 0], after[:, 0]]
        state = jnp.concatenate([state[:, :, 1:], jnp.stack(left, axis=1)[:, :, None]], axis=2)
        ahead = correct(state[:, 0], corrections, own["keep"], state[:, 1, 0] + of_experts)
        return _prediction(params, own, ahead), state.at[:, 0].set(ahead)

    def begin(self, params: Any, state: Any, embedding: jax.Array, tokens: Array) -> tuple[Prediction, Any]:
        network = params["network"]
        row = jnp.asarray(network["row"]).at[tokens].get(mode="fill", fill_value=0)
        this, after, guess = jnp.unstack(network["tokens"][row], axis=1)
        left, echoes, *_, of_last = jnp.unstack(state, axis=1)
        base = this + of_last
        ahead = base + left * network["begin_keep"]
        own = {name: network[name][0] for name in ("scale", "shift")}
        return _prediction(params, own, ahead), jnp.stack([ahead, echoes, base, guess, after], axis=1)

    def multiply_adds(self, spec: Spec) -> int:
        """Multiply-adds for one token, of all layers and `begin`; tables are looked up, not multiplied."""
        D, E, L, m, H = spec.d_model, spec.num_experts, spec.num_layers, self.expert_hidden, spec.horizon
        R, N = map(len, ahead_of(L))
        of_experts = spec.top_k * (m * (D + E) + (R + N + 1) * E)
        layer = D * R * E + (N + 1) * E * E + of_experts + (R + N) * E + H * E
        return L * layer + L * E + H * E


def params_of(network: dict[str, jax.Array], spec: Spec) -> Any:
    """Parameters of trained tables."""
    return {"network": network, "eps": jnp.float32(spec.norm_eps), "rule": Rule(spec.routing)}


def correct(ahead: jax.Array, corrections: list, keep: jax.Array, besides: jax.Array) -> jax.Array:
    """Corrects estimates of the layers ahead, [..., L, E]; the next one's by `besides` too. `keep` [R + N, E]."""
    read, news = ahead_of(ahead.shape[-2])
    for place, (h, correction, kept) in enumerate(zip((*read, *news), corrections, keep, strict=True)):
        more = correction + besides if place == 0 else correction
        ahead = ahead.at[..., h - 1, :].set(ahead[..., h - 1, :] * kept + more)
    return ahead


def _prediction(params: Any, own: Any, ahead: jax.Array) -> Prediction:
    logits = ahead[:, : len(own["scale"])]  # [B, H, E]
    return Prediction(jax.nn.sigmoid(margins(own, logits, params["rule"].routing.top_k)), logits)


def margins(own: Any, logits: jax.Array, top_k: int) -> jax.Array:
    """Logits of membership in the true top K out of estimated router logits [..., H, E]."""
    # Membership depends on how far a logit lies above or below the boundary between the K-th and the next one.
    above = logits - jax.lax.stop_gradient(boundary(logits, top_k))
    return above * own["scale"][..., None] + own["shift"][..., None]


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


def normalise(residual: Array, eps: Any) -> jax.Array:
    """RMS norm without a weight, float32."""
    x = jnp.asarray(residual, jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def ranked_by(logits: Array, own: Any, routing: Routing) -> jax.Array:
    """Router logits as `ranked_log.py` gives them to the fit: the largest are those that the model chooses."""
    if not routing.correction_bias and routing.num_groups == 1:
        return jnp.asarray(logits)
    return evidence(jnp.asarray(logits, jnp.float32), routing, own.get("correction"))


def centred(logits: Array) -> jax.Array:
    """Without their mean over experts, which no choice depends on, float32."""
    logits = jnp.asarray(logits, jnp.float32)
    return logits - logits.mean(-1, keepdims=True)


# ---- whole windows ---------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What the network reads of windows of a log."""

    rows: Any  # int32 [W, T] of `tokens`
    x: jax.Array  # float32 [L, W, T, D] normalised residuals
    logits: jax.Array  # float32 [L, W, T, E], centred
    gates: jax.Array  # float32 [L, W, T, E], 0 for those not chosen


def score_windows(network: Any, inputs: Inputs, top_k: int, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """What `begin` and `apply` say of whole windows, without going through them token by token.

    Args:
      dtype: of tables, activations and estimates on the way to the logits.

    Returns:
      Estimated router logits and logits of membership, float32 [P, W * T, H, E], of all P = L + 1 places.
    """
    own = {name: network[name][:, None] for name in ("scale", "shift")}
    network = {name: table.astype(dtype) for name, table in network.items()}
    rows, (x, logits, gates) = inputs.rows, (z.astype(dtype) for z in inputs[1:])
    L, W, T, E = gates.shape
    this, after, guess = jnp.moveaxis(network["tokens"][rows], (2, 3), (0, 1))  # [L, W, T, E]
    base = this + before(after)
    by_layer = lambda table: table[:, None, None]
    read = jnp.einsum("lwtd,ldr->lwtr", x, network["read"]) + by_layer(network["centre"])
    news = jnp.einsum("lwte,leo->lwto", logits - base, network["mix"])
    of_gates = jnp.einsum("lwte,leo->lwto", gates, network["gates"])
    inner = jnp.einsum("lwtd,ledm->lwtem", x, network["expert_in"]) + by_layer(network["expert_bias"])
    of_experts = jnp.einsum("lwte,lwtem,lemo->lwto", gates, jax.nn.gelu(inner), network["expert_out"])
    said = jnp.concatenate([read, news, jnp.zeros_like(base)], axis=-1) + of_gates + by_layer(network["bias"])
    said = said.reshape(L, W, T, -1, E)
    echo = jnp.einsum("lwte,lef->lwtf", read[..., :E], network["echo"])
    heard = jnp.concatenate([before(echo), echo[:1]])[1:]  # the last layer's next one is of the next token
    H = network["scale"].shape[-1]

    def layer(ahead, own):  # ahead: L arrays [W, T, E], stacked
        said, guess, keep, besides = own
        *corrections, first = jnp.unstack(said, axis=2)
        ahead = jnp.concatenate([ahead[:, :, 1:], (first + guess)[:, :, None]], axis=2)
        ahead = correct(ahead, corrections, keep, besides)
        return ahead, ahead[:, :, :H]

    of_layers = (said, guess, network["keep"], heard + of_experts)
    # What a token leaves for the next one does not depend on the estimates that it began with.
    left = jax.lax.scan(layer, jnp.zeros((W, T, L, E), dtype), of_layers)[0]
    began = jnp.moveaxis(base, 0, 2) + before(left[None])[0] * network["begin_keep"]
    stages = jax.lax.scan(layer, began, of_layers)[1]
    logits = jnp.concatenate([began[None, :, :, :H], stages]).reshape(L + 1, W * T, H, E).astype(jnp.float32)
    return logits, margins(own, logits, top_k)


def window_inputs(eps: Any, a: Activations, row: Array) -> Inputs:
    """The network's inputs; `row` is its table of that name."""
    by_layer = lambda z: jnp.swapaxes(z, 0, 1)
    one_hot = jax.nn.one_hot(by_layer(a.ids).astype(jnp.int32), a.logits.shape[-1])
    gates = (one_hot * by_layer(a.gates).astype(jnp.float32)[..., None]).sum(-2)
    rows = jnp.asarray(row).at[a.tokens].get(mode="fill", fill_value=0)
    return Inputs(rows, normalise(by_layer(a.residual), eps), centred(by_layer(a.logits)), gates)


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
    both = jnp.concatenate([this, following])
    wanted = jnp.stack([both[h : h + L + 1] for h in range(horizon)], axis=3)
    wraps = (jnp.arange(L + 1)[:, None] + jnp.arange(horizon)) >= L  # [P, H]
    known = (jnp.arange(T)[None, :, None] + wraps[:, None, None, :]) < lengths[:, None, None]  # [P, W, T, H]
    return wanted.reshape(L + 1, W * T, horizon, E), known.reshape(L + 1, W * T, horizon)

"""The learned predictor: a running estimate of every layer's router logits, which each layer corrects a little.

When a token enters, its embedding gives a first estimate for all layers (`begin`). Every layer then corrects those of a
few layers ahead, and leaves two things for the next token: a first estimate for its own layer, and an *echo*, what the
next token's attention will make of this token there, which is added when that layer is the next. So a target is refined
several times before it is reached, and a few directions of the residual serve for all that a layer says. What the
chosen experts are about to add is looked up in tables, which costs almost nothing, but that for the next layer each of
them has a small hidden layer of its own.

Estimates stand in the order in which their layers are reached, so that nothing is looked up by layer, and a call reads
the tables of one layer alone (`at`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.prediction.activation_log import Activations
from moe_jax.prediction.interface import Array, Features, ModelParts, Prediction, Rule, Spec

LAYER = ("read", "say", "gates", "bias", "keep", "expert_in", "expert_bias", "expert_out")  # tables by layer
CORRECTED = (1, 2, 4, 8)
"""Layers ahead whose estimates a layer corrects; between them an estimate moves on as it is."""


def corrected(num_layers: int) -> tuple[int, ...]:
    """Those of `CORRECTED` that a model has."""
    return tuple(h for h in CORRECTED if h <= num_layers)


class Learned:
    """State: float32 [B, 2, L, E]. Of the layers ahead, the one that is reached next first: estimates of their router
    logits, and their echoes. All zero, which is about their mean, while nothing is known: after a prompt.

    Args:
      rank: directions of the residual that a layer reads, per expert. To tell experts apart takes nearly as many as
        there are experts.
      begin_rank: directions of the embedding that `begin` reads, per expert.
      expert_hidden: width of every expert's hidden layer.
    """

    name = "learned"

    def __init__(self, rank: float = 2.0, begin_rank: float = 2.0, expert_hidden: int = 2):
        self.rank, self.begin_rank, self.expert_hidden = rank, begin_rank, expert_hidden

    def ranks(self, spec: Spec) -> tuple[int, int]:
        """Directions that a layer reads, and that `begin` reads."""
        most = lambda per_expert: max(1, min(spec.d_model, int(per_expert * spec.num_experts)))
        return most(self.rank), most(self.begin_rank)

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        """Untrained parameters, which say nothing.

        What a layer says is, in this order: its corrections of the N layers of `corrected`, a first estimate of itself
        for the next token, and its echo.
        """
        D, E, L, (R, S) = spec.d_model, spec.num_experts, spec.num_layers, self.ranks(spec)
        N, m, zeros, keys = len(corrected(L)), self.expert_hidden, jnp.zeros, iter(jax.random.split(rng, 3))
        normal = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(D)
        network = {
            "read": normal(L, D, R),
            "say": zeros((L, R, (N + 2) * E)),
            "gates": zeros((L, E, (N + 2) * E)),  # rows of the chosen experts
            "bias": zeros((L, (N + 2) * E)),
            "keep": zeros((L, N, E)),  # how much of an estimate stays when it is corrected
            "expert_in": normal(L, E, D, m),
            "expert_bias": zeros((L, E, m)),
            "expert_out": zeros((L, E, m, E)),
            "begin_read": normal(D, S),
            "begin_say": zeros((S, L * E)),
            "begin_bias": zeros(L * E),
            "begin_keep": zeros((L, E)),
            "scale": jnp.ones((L + 1, spec.horizon)),  # place 0 is before layer 0, place l + 1 is layer l
            "shift": zeros((L + 1, spec.horizon)),
        }
        return params_of(network, spec)

    def init_state(self, spec: Spec, batch: int) -> Any:
        return jnp.zeros((batch, 2, spec.num_layers, spec.num_experts))

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        return self.init_state(spec, ids.shape[1])

    def at(self, params: Any, layer: Any) -> Any:
        """The part of the parameters that `apply` reads at layer int or int32 []; `apply` takes it in their stead."""
        network = params["network"]
        here = {name: network[name][layer] for name in LAYER}
        here |= {name: network[name][layer + 1] for name in ("scale", "shift")}
        return params | {"network": here}

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        if params["network"]["bias"].ndim == 2:
            params = self.at(params, features.layer)
        own, E = params["network"], state.shape[-1]
        x = normalise(features.residual, params["eps"])
        said = x @ own["read"] @ own["say"] + own["bias"]
        gates, ids = features.gates, features.ids
        said += jnp.einsum("bk,bko->bo", gates, own["gates"][ids])
        inner = jnp.einsum("bd,bkdm->bkm", x, own["expert_in"][ids]) + own["expert_bias"][ids]
        of_experts = jnp.einsum("bk,bkm,bkme->be", gates, jax.nn.gelu(inner), own["expert_out"][ids])
        *corrections, first, echo = jnp.split(said, said.shape[-1] // E, axis=-1)
        # This layer's own are used up, and make room for those of the next token.
        ahead = [*jnp.unstack(state[:, 0, 1:], axis=1), first]
        echoes = [*jnp.unstack(state[:, 1, 1:], axis=1), echo]
        correct(ahead, corrections, own["keep"], echoes[0] + of_experts)
        return _prediction(params, own, ahead), jnp.stack([jnp.stack(ahead, 1), jnp.stack(echoes, 1)], 1)

    def begin(self, params: Any, state: Any, embedding: jax.Array) -> tuple[Prediction, Any]:
        network, x = params["network"], normalise(embedding, params["eps"])
        said = (x @ network["begin_read"] @ network["begin_say"] + network["begin_bias"]).reshape(state[:, 0].shape)
        ahead = state[:, 0] * network["begin_keep"] + said
        own = {name: network[name][0] for name in ("scale", "shift")}
        return _prediction(params, own, jnp.unstack(ahead, axis=1)), jnp.stack([ahead, state[:, 1]], axis=1)

    def multiply_adds(self, spec: Spec) -> int:
        """Multiply-adds for one token, of all layers and `begin`; tables are looked up, not multiplied."""
        D, E, L, (R, S) = spec.d_model, spec.num_experts, spec.num_layers, self.ranks(spec)
        N = len(corrected(L))
        said = (N + 2) * E
        layer = D * R + R * said + spec.top_k * (said + self.expert_hidden * (D + E)) + N * E
        return L * layer + D * S + S * L * E + L * E


def params_of(network: dict[str, jax.Array], spec: Spec) -> Any:
    """Parameters of trained tables."""
    return {"network": network, "eps": jnp.float32(spec.norm_eps), "rule": Rule(spec.routing)}


def correct(ahead: list, corrections: list, keep: jax.Array, besides: jax.Array) -> None:
    """Corrects the estimates of the layers ahead in place, the next one's by `besides` too: [..., E], `keep` [N, E]."""
    for h, correction, kept in zip(corrected(len(ahead)), corrections, keep, strict=True):
        ahead[h - 1] = ahead[h - 1] * kept + correction
    ahead[0] = ahead[0] + besides


def _prediction(params: Any, own: Any, ahead: Any) -> Prediction:
    logits = jnp.stack(ahead[: len(own["scale"])], axis=1)  # [B, H, E]
    return Prediction(jax.nn.sigmoid(margins(own, logits, params["rule"].routing.top_k)), logits)


def margins(own: Any, logits: jax.Array, top_k: int) -> jax.Array:
    """Logits of membership in the true top K out of estimated router logits [..., H, E]."""
    # Membership depends on how far a logit lies above or below the boundary between the K-th and the next one.
    centred = logits - jax.lax.stop_gradient(boundary(logits, top_k))
    return centred * own["scale"][..., None] + own["shift"][..., None]


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


# ---- whole windows ---------------------------------------------------------------------------------------------


def score_windows(network: Any, x: Array, gates: Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """What `begin` and `apply` say of whole windows, without going through them token by token.

    Args:
      network: tables.
      x: normalised embeddings and residuals, float32 [P, W, T, D], of all P = L + 1 places.
      gates: of all experts, 0 for those not chosen, float32 [L, W, T, E].

    Returns:
      Estimated router logits and logits of membership, float32 [P, W, T, H, E].
    """
    L, E = gates.shape[0], gates.shape[-1]
    said = jnp.einsum("lwtr,lro->lwto", jnp.einsum("lwtd,ldr->lwtr", x[1:], network["read"]), network["say"])
    said += jnp.einsum("lwte,leo->lwto", gates, network["gates"]) + network["bias"][:, None, None]
    inner = jnp.einsum("lwtd,ledm->lwtem", x[1:], network["expert_in"]) + network["expert_bias"][:, None, None]
    of_experts = jnp.einsum("lwte,lwtem,lemo->lwto", gates, jax.nn.gelu(inner), network["expert_out"])
    parts = [jnp.split(layer, said.shape[-1] // E, axis=-1) for layer in said]
    corrections = [layer[:-2] for layer in parts]
    firsts, echoes = ([layer[part] for layer in parts] for part in (-2, -1))
    # First what each token leaves behind: the next one's estimates do not depend on its own before `begin`.
    behind: list[Any] = [None] * L
    for layer in range(L):
        behind = [*behind[1:], firsts[layer]]
        for h, correction, keep in zip(corrected(L), corrections[layer], network["keep"][layer], strict=True):
            if (earlier := behind[h - 1]) is not None:  # of the next token
                behind[h - 1] = earlier * keep + correction + (echoes[0] + of_experts[layer] if h == 1 else 0)
    begun = x[0] @ network["begin_read"] @ network["begin_say"] + network["begin_bias"]
    ahead = [
        before(left) * keep + say
        for left, keep, say in zip(behind, network["begin_keep"], jnp.split(begun, L, axis=-1), strict=True)
    ]
    heard = [before(echo) for echo in echoes] + echoes[:1]
    H = network["scale"].shape[-1]
    stages = [jnp.stack(ahead[:H], axis=-2)]
    for layer in range(L):
        ahead = [*ahead[1:], firsts[layer]]
        correct(ahead, corrections[layer], network["keep"][layer], heard[layer + 1] + of_experts[layer])
        stages.append(jnp.stack(ahead[:H], axis=-2))
    logits = jnp.stack(stages)
    own = {name: network[name][:, None, None] for name in ("scale", "shift")}
    return logits, margins(own, logits, top_k)


def window_inputs(eps: Any, a: Activations) -> tuple[jax.Array, jax.Array]:
    """`x` and `gates` of `score_windows`."""
    by_layer = lambda z: jnp.swapaxes(z, 0, 1)
    one_hot = jax.nn.one_hot(by_layer(a.ids).astype(jnp.int32), a.logits.shape[-1])
    gates = (one_hot * by_layer(a.gates).astype(jnp.float32)[..., None]).sum(-2)
    return normalise(jnp.concatenate([a.embedding[None], by_layer(a.residual)]), eps), gates


def before(this: Array) -> jax.Array:
    """[W, T, ...] of the token before, zero for a window's first."""
    return jnp.pad(this, ((0, 0), (1, 0), *[(0, 0)] * (this.ndim - 2)))[:, :-1]


def window_targets(values: jax.Array, lengths: jax.Array, horizon: int) -> tuple[jax.Array, jax.Array]:
    """What is to be predicted of per-layer `values` [W, L, T, E]: [P, W, T, H, E], and whether it is in the window.

    The second is bool [P, W, T, H]: false after a window's end, and where the next token would be needed and is not
    there.
    """
    L, T = values.shape[1:3]
    this = jnp.swapaxes(values, 0, 1)
    both = jnp.concatenate([this, jnp.pad(this, ((0, 0), (0, 0), (0, 1), (0, 0)))[:, :, 1:]])
    wraps = (jnp.arange(L + 1)[:, None] + jnp.arange(horizon)) >= L  # [P, H]
    known = (jnp.arange(T)[None, :, None] + wraps[:, None, None, :]) < lengths[:, None, None]
    return jnp.stack([both[h : h + L + 1] for h in range(horizon)], axis=3), known

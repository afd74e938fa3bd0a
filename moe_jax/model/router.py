"""The router: which experts a token needs, and with what weight, as `Routing` describes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.architecture import Architecture, Routing
from moe_jax.model.primitives import linear


class Router(nnx.Module):
    """Top-k router."""

    def __init__(self, a: Architecture, dtype, *, rngs: nnx.Rngs, std: float = 0.02):
        self.weight = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (a.num_experts, a.d_model), dtype))
        self.bias = nnx.Param(jnp.zeros(a.num_experts, dtype)) if a.routing.bias else None
        # Float32 in every checkpoint and every compute dtype: it decides between nearly equal scores.
        self.correction_bias = nnx.Param(jnp.zeros(a.num_experts, jnp.float32)) if a.routing.correction_bias else None
        self.routing = a.routing

    def logits(self, h: jax.Array) -> jax.Array:
        """h [R, D] to float32 router logits [R, E]."""
        weight, bias = self.weight[...], None if self.bias is None else self.bias[...]
        if not self.routing.float32:
            return linear(h, weight, bias).astype(jnp.float32)
        with jax.default_matmul_precision("float32"):  # accelerators would round the factors
            logits = linear(h.astype(jnp.float32), weight.astype(jnp.float32))
        return logits if bias is None else logits + bias.astype(jnp.float32)

    def choose(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [R, E] to expert ids int32 [R, K], the first choice first, and gates float32 [R, K]."""
        return choose(logits, self.routing, None if self.correction_bias is None else self.correction_bias[...])


def choose(logits: jax.Array, r: Routing, correction: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Float32 logits [R, E] and a correction [E] to ids int32 [R, K], the first choice first, and gates [R, K]."""
    scores, ranked = rank(logits, r, correction)
    gates, ids = jax.lax.top_k(ranked, r.top_k)
    if correction is not None:
        gates = jnp.take_along_axis(scores, ids, axis=-1)
    return ids, weigh(gates, r)


def weigh(scores: jax.Array, r: Routing) -> jax.Array:
    """Scores of the chosen experts [R, K] to their gates."""
    gates = scores
    if r.scoring == "softmax_chosen":
        gates = jax.nn.softmax(gates, axis=-1)
    elif r.renormalise:
        gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)  # sigmoids may all be 0; nothing to a softmax
    return gates if r.scale == 1.0 else gates * r.scale


def rank(logits: jax.Array, r: Routing, correction: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Scores, which gates are made of, and what experts are ranked by (-inf outside the kept groups), each [R, E]."""
    scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "softmax_chosen": lambda x: x}[r.scoring](logits)
    ranked = scores if correction is None else scores + correction
    if r.num_groups > 1:
        ranked = jnp.where(_kept(ranked, r), ranked, -jnp.inf)
    return scores, ranked


def _kept(scores: jax.Array, r: Routing) -> jax.Array:
    """Bool [R, E]: experts in the best groups (DeepSeek-V2, arXiv 2405.04434, section 2.2.2)."""
    grouped = scores.reshape(*scores.shape[:-1], r.num_groups, -1)
    best = jax.lax.top_k(grouped, {"max": 1, "top2": 2}[r.group_score])[0].sum(-1)  # [R, groups]
    groups = jax.lax.top_k(best, r.groups_kept)[1]
    kept = jax.nn.one_hot(groups, r.num_groups, dtype=bool).any(-2)
    return jnp.repeat(kept, grouped.shape[-1], axis=-1)

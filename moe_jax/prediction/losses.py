"""What the learned predictor is fitted to: named terms, of which `config.fit.loss` adds some up ("squared+membership").

| term         | what it wants                                                                                |
|--------------|----------------------------------------------------------------------------------------------|
| `squared`    | the target router's logits, centred: squared error over their variance, mean over experts    |
| `kl`         | the target router's softmax: KL(true || estimated), nats                                     |
| `membership` | which experts are the true top K: binary cross-entropy, nats, mean over experts              |
| `ranking`    | each of the top K above each of the others: logistic loss of the margin, mean over the pairs |

The first two read the estimated logits, which gates may be made of; the others the logits of membership, which are
these logits relative to the boundary of the top K, scaled. A constant that is added to the logits changes no term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.errors import UserError
from moe_jax.prediction.activation_log import Activations
from moe_jax.prediction.interface import Spec, multi_hot
from moe_jax.prediction.learned import window_targets


class Wanted(NamedTuple):
    """What some windows say the answers are, for all places, rows (window, token) and horizons."""

    ids: jax.Array  # int32 [P, R, H, K]: the true top K
    members: jax.Array  # the same, multi-hot [P, R, H, E]
    logits: jax.Array  # of the router, centred, [P, R, H, E]
    known: jax.Array  # bool [P, R, H]: false beyond the end of a window


def wanted(spec: Spec, a: Activations) -> Wanted:
    logits = a.logits.astype(jnp.float32)
    centred, known = window_targets(logits - logits.mean(-1, keepdims=True), a.lengths, spec.horizon)
    ids, _ = window_targets(a.ids.astype(jnp.int32), a.lengths, spec.horizon)
    return Wanted(ids, multi_hot(ids, spec.num_experts), centred, known)


def squared(wanted: Wanted, logits: jax.Array, margins: jax.Array) -> jax.Array:
    known = wanted.known[..., None]
    count = jnp.maximum(known.sum((1, 3), keepdims=True), 1) * logits.shape[-1]
    variance = (wanted.logits**2 * known).sum((1, 3), keepdims=True) / count + 1e-6  # [P, 1, H, 1]
    return ((logits - logits.mean(-1, keepdims=True) - wanted.logits) ** 2 / variance).mean(-1)


def kl(wanted: Wanted, logits: jax.Array, margins: jax.Array) -> jax.Array:
    true, found = jax.nn.log_softmax(wanted.logits), jax.nn.log_softmax(logits)
    return (jnp.exp(true) * (true - found)).sum(-1)


def membership(wanted: Wanted, logits: jax.Array, margins: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(margins, wanted.members).mean(-1)


def ranking(wanted: Wanted, logits: jax.Array, margins: jax.Array) -> jax.Array:
    E, K = wanted.members.shape[-1], wanted.ids.shape[-1]
    chosen = jnp.take_along_axis(margins, wanted.ids, axis=-1)  # [P, R, H, K]
    pairs = jax.nn.softplus(margins[..., None, :] - chosen[..., None]) * (1 - wanted.members[..., None, :])
    return pairs.sum((-2, -1)) / max(K * (E - K), 1)


Term = Callable[[Wanted, jax.Array, jax.Array], jax.Array]
"""(wanted, estimated router logits, logits of membership), both [P, R, H, E], to a loss for each target, [P, R, H]."""
TERMS: dict[str, Term] = {term.__name__: term for term in (squared, kl, membership, ranking)}


def check(loss: str) -> None:
    """Raises UserError where `loss` is not a sum of terms."""
    names = loss.split("+")
    if unknown := [name for name in names if name not in TERMS]:
        raise UserError(f"loss {loss!r}: {unknown[0]!r} is no term; join some of {', '.join(TERMS)} with +")
    if len(set(names)) < len(names):
        raise UserError(f"loss {loss!r} names a term twice")


def total(loss: str, wanted: Wanted, logits: jax.Array, margins: jax.Array) -> jax.Array:
    """The sum of the terms that `loss` names, [P, R, H]."""
    return sum((TERMS[name](wanted, logits, margins) for name in loss.split("+")), jnp.zeros(wanted.known.shape))

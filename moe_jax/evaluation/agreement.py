"""How far a checkpoint's predictions are from another's: what quantising costs, on any text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.inference.grouping import assign
from moe_jax.model.architecture import Architecture
from moe_jax.model.decoder import Stages, device_weights
from moe_jax.model.experts import ExpertWeights


class Checkpoint(Protocol):
    """`HFCheckpoint` and `Converted` are such."""

    architecture: Architecture

    def dense(self) -> dict[str, Any]:
        """Dense weights in the tree of `layers.Decoder`."""
        ...

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """One expert, as numpy arrays."""
        ...


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two models on one text, every token but the first of each window predicted once."""

    tokens: int
    kl: float  # mean over tokens of KL(reference || other), nats
    perplexity_reference: float
    perplexity: float
    same_choice: float  # share of tokens where both find the same token most probable


def compare(reference: Checkpoint, other: Checkpoint, ids: Sequence[int], context: int = 256) -> Agreement:
    """Compares the predictions of two checkpoints of one architecture, in float32.

    Experts are read from the checkpoints one at a time, so that memory need not hold them.

    Args:
      ids: one text; cut into windows of `context` tokens, what is left over at the end is not used.

    Raises:
      UserError: the text is shorter than one window, or the models are not of one architecture.
    """
    a = reference.architecture
    if other.architecture != a:
        raise UserError("the two checkpoints are not of one architecture")
    context = min(context, a.max_seq_len)
    windows = np.asarray(ids, np.int32)[: len(ids) // context * context].reshape(-1, context)
    if not len(windows):
        raise UserError(f"the text has {len(ids)} tokens; give at least {context}")
    stages = Stages(a, jnp.float32)
    models = [(device_weights(c.dense(), jnp.float32), c.expert) for c in (reference, other)]
    totals = np.zeros(4)
    rows = max(1, min(len(windows), ROWS // context))
    for start in range(0, len(windows), rows):
        tokens = windows[start : start + rows]
        hidden = [_hidden(stages, dense, expert, tokens) for dense, expert in models]
        for row in range(len(tokens)):  # logits of one window at a time: vocabularies are large
            p, q = (_logits(stages, dense, x[row]) for (dense, _), x in zip(models, hidden, strict=True))
            totals += np.asarray(_scores(p[:-1], q[:-1], tokens[row, 1:]))
    count = len(windows) * (context - 1)
    kl, nats_reference, nats, same = totals / count
    return Agreement(count, float(kl), math.exp(nats_reference), math.exp(nats), float(same))


ROWS = 8192
"""Token rows that go through a layer together."""


def _hidden(
    stages: Stages, dense: Any, expert_of: Callable[[int, int], ExpertWeights], tokens: np.ndarray
) -> jax.Array:
    """Last hidden states [B, T, D] of tokens int32 [B, T]."""
    a, (B, T) = stages.architecture, tokens.shape
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    rope, kv, x = stages.rope(T), stages.kv_cache(B, T), stages.embed(dense, tokens)
    experts_of = {layer: i for i, layer in enumerate(a.moe_layers)}
    for layer in range(a.num_layers):
        if layer not in experts_of:
            x = stages.dense_layer(layer, dense, rope, x, positions, kv)
            continue
        routed = stages.route(layer, dense, rope, x, positions, kv)
        outputs, ids = routed.outputs, np.asarray(routed.ids)
        everyone = np.ones(len(ids), bool)
        for expert in np.unique(ids).tolist():
            weights = jax.tree.map(jnp.asarray, expert_of(experts_of[layer], expert))
            rows, slots = assign(ids, everyone, [expert], len(ids))
            outputs, done = stages.experts(outputs, routed.h, rows, slots, (weights,))
            done.block_until_ready()  # before the next expert is read
        x = stages.combine(routed.residual, outputs, routed.gates, x)
    return x


def _logits(stages: Stages, dense: Any, x: jax.Array) -> jax.Array:
    """x [T, D] to float32 logits [T, V]."""
    return stages.head(dense, x[:, None])


@jax.jit
def _scores(p: jax.Array, q: jax.Array, targets: jax.Array) -> jax.Array:
    """Sums over rows of KL, both negative log likelihoods and equal choices, from logits [T, V]."""
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    nats = lambda x: -jnp.take_along_axis(x, targets[:, None], axis=1).sum()
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
    return jnp.stack([kl, nats(log_p), nats(log_q), jnp.sum(p.argmax(1) == q.argmax(1))])

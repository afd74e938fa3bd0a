"""Activations of texts: batched prefill, with a sink that keeps what every layer's router saw and its experts gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.inference.engine import Engine
from moe_jax.model.decoder import Routed
from moe_jax.model.platforms import reproducible
from moe_jax.prediction.activation_log import ActivationLog, Activations, Outputs, half, not_finite

BATCH = 8  # windows that go through the model together: `Config.prefill_chunk` of BATCH windows runs them as one


def write_log(engine: Engine, log: ActivationLog, progress: Callable[[int], None] = lambda windows: None) -> None:
    """Prefills every window that the log lacks, shard by shard; `progress` is told how many windows are done.

    Raises:
      UserError: the disk does not take it, or the model gives something that is not finite.
    """
    missing = log.missing()
    done = len(log.windows.tokens) - sum(len(log.rows(shard)) for shard in missing)
    for shard in missing:
        rows, parts = log.rows(shard), []
        a = engine.architecture
        total = Outputs(np.zeros((a.num_moe_layers, a.num_experts, a.d_model)), np.zeros((1, 1), np.int64))
        for start in range(0, len(rows), BATCH):
            batch, outputs = run_windows(engine, log, rows[start : start + BATCH])
            parts.append(batch)
            total = Outputs(total.sums + outputs.sums, total.counts + outputs.counts)
            done += len(batch.lengths)
            progress(done)
        columns = [column for column in zip(*parts, strict=True) if column[0] is not None]
        log.write(shard, Activations(*(np.concatenate(column) for column in columns)), total)


def run_windows(engine: Engine, log: ActivationLog, rows: Sequence[int] | np.ndarray) -> tuple[Activations, Outputs]:
    """The activations of at most BATCH windows of the log's plan, and what their experts gave."""
    a, T = engine.architecture, log.windows.tokens.shape[1]
    lengths = np.zeros(BATCH, np.int32)
    lengths[: len(rows)] = log.windows.lengths[rows]
    # Always BATCH prompts, so that one set of executables serves all.
    prompts = [log.windows.tokens[row, : log.windows.lengths[row]].tolist() for row in rows]
    prompts += [[0]] * (BATCH - len(prompts))
    seen: list[list[list[np.ndarray]]] = [[[] for _ in range(a.num_moe_layers)] for _ in range(4)]
    sums: list[list[jax.Array]] = [[] for _ in range(a.num_moe_layers)]
    counts = np.zeros((a.num_moe_layers, a.num_experts), np.int64)

    def sink(layer: int, chunk: int, routed: Routed) -> None:
        ids, residual, logits = (
            np.asarray(routed.ids),
            np.asarray(routed.residual, np.float32),
            np.asarray(routed.logits),
        )
        kept = half(residual), half(logits), ids, routed.gates
        width = len(ids) // BATCH
        for store, array in zip(seen, kept, strict=True):
            store[layer].append(np.asarray(array).reshape(BATCH, width, -1))  # [B, tokens of the chunk, ...]
        real = (chunk * width + np.arange(width) < lengths[:, None]).reshape(-1)
        if not (np.isfinite(residual[real]).all() and np.isfinite(logits[real]).all()):
            raise not_finite(layer)
        sums[layer].append(_sum_by_expert(a.num_experts, routed.outputs, routed.ids, real))
        counts[layer] += np.bincount(ids[real].reshape(-1), minlength=a.num_experts)

    engine.prefill(prompts, 0, sink)
    joined = [np.stack([np.concatenate(chunks, axis=1)[:, :T] for chunks in store], axis=1) for store in seen]
    joined = [np.pad(x, ((0, 0), (0, 0), (0, T - x.shape[2]), (0, 0)))[: len(rows)] for x in joined]
    summed = np.stack([np.sum([np.asarray(x, np.float64) for x in chunks], axis=0) for chunks in sums])
    if not (finite := np.isfinite(summed).all((1, 2))).all():
        raise not_finite(int(np.argmin(finite)))
    embedding = half(np.asarray(engine.dense["embedding"][log.windows.tokens[rows]], np.float32))
    return Activations(*[embedding, *joined, lengths[: len(rows)]]), Outputs(summed, counts)


@reproducible(static_argnums=0)
def _sum_by_expert(num_experts: int, outputs: jax.Array, ids: jax.Array, real: jax.Array) -> jax.Array:
    """Sums float32 [E, D] of outputs [R * K, D] over the real rows, by the expert that gave them."""
    hot = jax.nn.one_hot(ids, num_experts) * real[:, None, None]  # [R, K, E]
    return jnp.einsum("rke,rkd->ed", hot, outputs.reshape(*ids.shape, -1).astype(jnp.float32))

"""A small made-up model, and logs of it in which experts can be predicted, but not by its routers as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_jax.model.architecture import Routing
from moe_jax.prediction.activation_log import ActivationLog, Activations, Outputs
from moe_jax.prediction.interface import ModelParts, Spec
from moe_jax.prediction.texts import Windows

MODEL = "a made-up model"
SPEC = Spec(num_layers=3, num_experts=6, d_model=12, norm_eps=1e-5, horizon=3, routing=Routing(top_k=2))


def parts(spec: Spec = SPEC, seed: int = 0) -> ModelParts:
    rng = np.random.default_rng(seed)
    routers = rng.normal(size=(spec.num_layers, spec.num_experts, spec.d_model)).astype(np.float32)
    return ModelParts(routers, (1 + 0.2 * rng.normal(size=(spec.num_layers, spec.d_model))).astype(np.float32))


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logits, axis=-1, kind="stable")[..., :k]


def activations(
    spec: Spec, model: ModelParts, count: int, length: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual, logits and ids [n, L, T, ...]: every layer turns the residual by a fixed rotation, and adds noise.

    A token resembles the one before, so that repeating its experts is worth something.
    """
    rng = np.random.default_rng([seed, 1])
    turns = np.random.default_rng(5).normal(size=(spec.num_layers, spec.d_model, spec.d_model))
    token = rng.normal(size=(count, length, spec.d_model))
    for t in range(1, length):
        token[:, t] = 0.6 * token[:, t - 1] + 0.8 * token[:, t]
    residual = [token]
    for layer in range(1, spec.num_layers):
        turned = residual[-1] @ np.linalg.qr(turns[layer])[0]
        residual.append(turned + 0.1 * rng.normal(size=turned.shape))
    x = np.stack(residual, axis=1)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * model.expert_norms[:, None]
    logits = np.einsum("nltd,led->nlte", normed, model.routers)
    return x.astype(np.float32), logits.astype(np.float32), top_k(logits, spec.top_k)


def embedding(residual: np.ndarray) -> np.ndarray:
    """What enters layer 0, [n, T, D]: something of its residual."""
    return residual[:, 0] + 0.5 * np.random.default_rng(7).normal(size=residual[:, 0].shape).astype(np.float32)


def logged(arrays: tuple[np.ndarray, np.ndarray, np.ndarray], rows: np.ndarray | None = None) -> Activations:
    """As a log holds them, of some windows or of all."""
    residual, logits, ids = arrays if rows is None else [array[rows] for array in arrays]
    chosen = np.exp(np.take_along_axis(logits, ids, axis=-1))
    lengths = np.full(len(ids), ids.shape[2], np.int32)
    gates = chosen / chosen.sum(-1, keepdims=True)
    tokens = windows(len(ids), ids.shape[2]).tokens
    return Activations(embedding(residual), residual, logits, ids, gates, lengths, tokens)


def outputs(spec: Spec, shard: int) -> Outputs:
    """Made-up sums; expert 1 of layer 0 is never seen."""
    rng = np.random.default_rng(shard)
    counts = rng.integers(1, 9, (spec.num_layers, spec.num_experts))
    counts[0, 1] = 0
    return Outputs(rng.normal(size=(*counts.shape, spec.d_model)) * counts[..., None], counts)


def windows(count: int, length: int, lengths: np.ndarray | None = None, seed: int = 0) -> Windows:
    tokens = np.random.default_rng(seed).integers(1, 50, (count, length)).astype(np.int32)
    full = np.full(count, length, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    return Windows(tokens, full, np.arange(count, dtype=np.int32), [f"document {i}" for i in range(count)])


def written_log(
    directory: Path,
    count: int = 24,
    length: int = 16,
    lengths: np.ndarray | None = None,
    spec: Spec = SPEC,
    seed: int = 0,
) -> ActivationLog:
    """A complete log of `count` windows."""
    model = parts(spec)
    log = ActivationLog(directory, spec, MODEL, windows(count, length, lengths, seed))
    arrays = activations(spec, model, count, length, seed)
    for shard in log.missing():
        log.write(shard, logged(arrays, log.rows(shard)), outputs(spec, shard))
    return log

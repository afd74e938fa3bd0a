"""The training loop of the small language model: optimizer, checkpoints, resume, progress, held-out scores."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import logging

from moe_jax.checkpoint.families import mixtral
from moe_jax.checkpoint.hf import reading
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture
from moe_jax.model.platforms import reproducible
from moe_jax.outputs import claim, room
from moe_jax.prediction.scalars import JsonLines
from moe_jax.training import corpus, lm

_FREE = ("data", "output", "checkpoint_every", "evaluate_every")  # fields that a run may go on with other values of


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run; see `configs/tiny_lm.py` for what the values mean."""

    data: str
    output: str
    seed: int
    architecture: Architecture
    domain_weights: dict[str, float]
    steps: int
    batch_tokens: int
    context: int
    final_context: int
    final_context_steps: int
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    weight_decay: float
    capacity_factor: float
    balance_loss: float
    final_balance_loss: float
    final_balance_steps: int
    router_z_loss: float
    z_loss: float
    checkpoint_every: int
    evaluate_every: int

    def __post_init__(self):
        for name in ("steps", "context", "final_context", "checkpoint_every", "evaluate_every"):
            if not getattr(self, name) >= 1:
                raise UserError(f"config.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("context", "final_context"):
            if (window := getattr(self, name)) > self.batch_tokens:
                raise UserError(f"config.batch_tokens={self.batch_tokens} must be at least config.{name}={window}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """From a plain dictionary (a ConfigDict's `to_dict()`).

        Raises:
          UserError: a field is missing, unknown or out of range.
        """
        values, known = dict(values), {field.name for field in dataclasses.fields(cls)}
        for problem, names in (("lacks", known - values.keys()), ("has unknown", values.keys() - known)):
            if names:
                raise UserError(f"the config {problem} {', '.join(sorted(names))}; see configs/tiny_lm.py")
        try:
            values["architecture"] = mixtral.architecture(**values["architecture"], bos_id=0, eos_ids=(1,))
        except TypeError as error:
            raise UserError(f"config.architecture is not complete ({error}); see configs/tiny_lm.py") from None
        return cls(**values)


def optimizer(c: TrainConfig) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982) on every projection, AdamW on embeddings, routers and norms; warm-up, hold, decay."""
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps),
            optax.constant_schedule(c.learning_rate),
            optax.linear_schedule(c.learning_rate, 0.0, c.decay_steps),
        ],
        [c.warmup_steps, c.steps - c.decay_steps],
    )

    def dimensions(params):
        def one(path, x):
            name = jax.tree_util.keystr(path)
            adam = x.ndim < 2 or any(part in name for part in ("embedding", "head", "router"))
            # Weights are [..., out, in]; leading axes are separate matrices.
            return None if adam else optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

        return jax.tree_util.tree_map_with_path(one, params)

    muon = optax.contrib.muon(
        schedule,
        ns_steps=4,
        preconditioning="aol",
        weight_decay=c.weight_decay,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
        adam_b2=0.95,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def bits_per_byte(score, params, tokens: np.ndarray, text_bytes: int, context: int) -> float:
    """Bits per byte of a token stream in windows of `context` inputs, stride `context`: each token predicted once.

    Args:
      score: jitted (params, rows int32 [B, context + 1]) -> nats of every target, [B, context].
      tokens: int [n]; text_bytes: UTF-8 bytes that they encode.
    """
    count = (len(tokens) - 1) // context
    rows = np.stack([tokens[i * context : (i + 1) * context + 1] for i in range(count)]).astype(np.int32)
    nats = 0.0
    for start in range(0, count, 16):
        block = rows[start : start + 16]
        padded = np.pad(block, ((0, 16 - len(block)), (0, 0)))
        nats += float(np.asarray(score(params, padded), np.float64)[: len(block)].sum())
    # The tail shorter than a window is left out of both sides of the quotient.
    return nats / math.log(2) / (text_bytes * count * context / (len(tokens) - 1))


def train(c: TrainConfig) -> dict[str, Any]:
    """Trains (or resumes) to `c.steps`; returns the final parameters `lm.Params`.

    Checkpoints lie under `c.output`/checkpoints. A killed run resumes from the newest complete one and ends with the
    same parameters as an uninterrupted run: data depend on the step alone. (More steps than it was planned for would
    not give those of a run that was planned so: the learning rate has gone to zero.)

    Raises:
      UserError: there are no data, the checkpoints are of a run with other settings or data, or the disk is full.
    """
    a = c.architecture
    output = Path(c.output).absolute()
    streams, manifest = _load(Path(c.data))
    domains = manifest["domains"]
    settings = {name: x for name, x in dataclasses.asdict(c).items() if name not in _FREE}
    with room(output, resumes=True):
        claim(output, {"settings": settings, "data": manifest}, "a run of other settings or data")
    graph, params = lm.init_params(a, c.seed)
    tx = optimizer(c)
    state = {"params": params, "opt": tx.init(params)}

    @reproducible(donate_argnums=0)
    def update(state, rows, balance_loss):
        grad = jax.value_and_grad(lambda p: lm.loss_fn(a, graph, p, rows, c, balance_loss), has_aux=True)
        (_, stats), grads = grad(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, stats

    @reproducible()
    def score(params, rows):
        logits, _ = lm.forward(a, graph, params, rows[:, :-1], a.num_experts / a.top_k)  # nothing is dropped
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])

    # What a full disk or a kill left of a checkpoint is removed.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=c.checkpoint_every, cleanup_tmp_directories=True
    )
    checkpoints = output / "checkpoints"
    with (
        contextlib.closing(JsonLines(output / "log.jsonl")) as log,
        room(checkpoints, resumes=True),
        ocp.CheckpointManager(checkpoints, options=options) as manager,
    ):
        start = manager.latest_step() or 0
        if start:
            state = manager.restore(start, args=ocp.args.StandardRestore(state))
            logging.info("resumed from step %d of %d", start, c.steps)
        began, seen = time.time(), 0
        for step in range(start, c.steps):
            context = c.context if step < c.steps - c.final_context_steps else c.final_context
            rows = corpus.batch(streams["train"], c.domain_weights, step, c.seed, c.batch_tokens // context, context)
            balance = c.balance_loss if step < c.steps - c.final_balance_steps else c.final_balance_loss
            state, stats = update(state, rows, np.float32(balance))
            seen += c.batch_tokens
            done = step + 1
            if done % 20 == 0 or done == c.steps:
                jax.block_until_ready(stats)  # steps run asynchronously
                speed = seen / (time.time() - began)
                logging.info(
                    "step %d/%d loss %.3f balance %.2f dropped %.1f%% least-used expert %.2f of its share,"
                    " %.0f tokens/s, %.0f min left",
                    *(done, c.steps, stats["nll"], stats["balance"], 100 * stats["dropped"]),
                    *(float(stats["load"].min()) * a.num_experts, speed),
                    (c.steps - done) * c.batch_tokens / speed / 60,
                )
            if done % c.evaluate_every == 0 or done == c.steps:
                scores = {
                    domain: bits_per_byte(
                        score, state["params"], stream, domains[domain]["validation"]["bytes"], c.context
                    )
                    for domain, stream in streams["validation"].items()
                }
                logging.info("step %d validation bits/byte: %s", done, {k: round(v, 3) for k, v in scores.items()})
                log.write(done, {"nll": float(stats["nll"]), **scores})
            manager.save(done, args=ocp.args.StandardSave(state), force=done == c.steps)
        manager.wait_until_finished()
    return state["params"]


def _load(data: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Token streams by split and domain, and the manifest."""
    with reading(data):
        if not (data / "manifest.json").exists():
            raise UserError(f"no training data in {data}; `pydoc moe_jax.training.corpus` says how to make it")
        streams = {split: corpus.load_streams(data, split) for split in ("train", "validation")}
        return streams, json.loads((data / "manifest.json").read_text())

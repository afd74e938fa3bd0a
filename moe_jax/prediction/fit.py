"""Fits the learned predictor to an activation log: a linear solution in closed form, then gradient descent.

Least squares against the target layers' router logits gets the direct part near its best in one pass over the log,
which thousands of gradient steps would not (`closed_form.py`). Gradient descent on a sum of losses (`losses.py`) then
trains all of it: outputs become calibrated probabilities.

A fit in bfloat16 computes its gradient steps so. The trained tables and the state of the optimizer stay float32, as do
the losses, the closed form and the looks at the validation windows, which choose among networks as they will be used.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import logging

from moe_jax.config import choices
from moe_jax.errors import UserError
from moe_jax.model.platforms import reproducible
from moe_jax.outputs import claim, room
from moe_jax.prediction import losses
from moe_jax.prediction.activation_log import ActivationLog, Activations
from moe_jax.prediction.closed_form import calibrate, least_squares, padded, rows_of, unwhiten
from moe_jax.prediction.interface import ModelParts, Spec
from moe_jax.prediction.learned import Learned, params_of, score_windows, window_inputs
from moe_jax.prediction.ranked_log import ranked

HIDDEN = ("expert_in", "expert_bias", "expert_out")  # what the closed form leaves to be found
Schedule = tuple[int, float, float]
"""Steps, and the peak learning rates of the hidden layer and of the direct part."""
Solved = tuple[dict[str, Any], dict[str, np.ndarray]]
"""The closed form: the network in the whitened basis, and that basis."""


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How a predictor is fitted; `configs/predictor.py` says what the values cost.

    Attributes:
      expert_hidden: width of every expert's hidden layer.
      tokens: rows of the tables of tokens, at most: the most frequent ones have their own.
      loss: terms of `losses.py` joined by +.
      steps: gradient steps; 0 keeps the closed form.
      batch_windows: windows per step.
      learning_rate: peak rate of the hidden layers; the direct part, already solved for, gets `direct_rate` of it.
      ridge: regularisation of the closed form, relative to the mean square of the inputs.
      evaluate_every: steps between looks at the validation windows; the best of them is kept.
      checkpoint_every: steps between checkpoints.
      patience: looks without a better recall after which training stops.
      seed: of everything random.
      dtype: what gradient steps are computed in: "float32" or "bfloat16".
    """

    expert_hidden: int
    tokens: int
    loss: str
    steps: int
    batch_windows: int
    learning_rate: float
    direct_rate: float
    ridge: float
    seed: int
    evaluate_every: int
    checkpoint_every: int
    patience: int
    dtype: str = "float32"

    def __post_init__(self):
        losses.check(self.loss)
        if self.dtype not in choices("dtype"):
            raise UserError(f"config.fit.dtype={self.dtype!r} is not one of {', '.join(choices('dtype'))}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"config.seed must be from 0 to {2**32 - 1}, not {self.seed}")
        least = {
            "expert_hidden": 1,
            "tokens": 1,
            "steps": 0,
            "batch_windows": 1,
            "learning_rate": 0,
            "direct_rate": 0,
            "ridge": 0,
        }
        for name, low in (least | {"evaluate_every": 1, "checkpoint_every": 1, "patience": 1}).items():
            if not getattr(self, name) >= low:
                raise UserError(f"config.fit.{name} must be at least {low}, not {getattr(self, name)}")

    def schedule(self) -> Schedule:
        """The part that gradient steps are compiled for."""
        return self.steps, self.learning_rate, self.learning_rate * self.direct_rate


def solve(c: FitConfig, spec: Spec, parts: ModelParts, log: ActivationLog) -> Solved:
    """The closed form that a fit starts from, whatever its loss and steps."""
    log = ranked(log, spec, parts)
    began, rows = time.time(), np.arange(len(log.windows.tokens))
    network, row = _initial(c, spec, parts, log)
    network, basis = least_squares(network, row, spec, log, rows, c.ridge, c.batch_windows)
    logging.info("least squares took %.1f s", time.time() - began)
    return calibrate(spec, network, basis, row, _few(c, log)), basis


def fit(
    c: FitConfig,
    spec: Spec,
    parts: ModelParts,
    log: ActivationLog,
    validation: ActivationLog,
    directory: str | Path,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
    solved: Callable[[], Solved] | None = None,
) -> tuple[Any, dict[str, float]]:
    """Trains, or resumes what was killed: the result is the same to the bit.

    Args:
      log: complete.
      validation: of other text, which chooses and is not trained on.
      directory: for checkpoints; those of another configuration are refused.
      progress: told the loss at every step, and recall and loss on validation at every look.
      solved: gives what `solve` does, where fits share it.

    Returns:
      Parameters of `Learned` with the best recall on the validation windows, and {"recall", "loss", "step"} of them.

    Raises:
      UserError: the directory belongs to another run, its disk is full, or what was logged is not finite. Training that
        diverges ends with a warning, and the best look before is kept.
    """
    log, validation = ranked(log, spec, parts), ranked(validation, spec, parts)
    train, held_out = np.arange(len(log.windows.tokens)), np.arange(len(validation.windows.tokens))
    state = _start(c, spec, *_initial(c, spec, parts, log))
    directory = Path(directory).absolute()
    run: dict[str, Any] = {"fit": dataclasses.asdict(c), "spec": dataclasses.asdict(spec)}
    run |= {"train": log.identity(), "validation": validation.identity()}
    with room(directory, resumes=True):
        claim(directory, run, "a fit of other settings, model or text")

    def look(state, step):
        sums = np.zeros(3)
        for start in range(0, len(held_out), c.batch_windows):
            sums += np.asarray(
                _sums(c.loss, spec, state, padded(validation, held_out[start:], c.batch_windows)), np.float64
            )
        recall, loss = sums[1] / max(sums[0], 1), sums[2] / max(sums[0], 1)
        progress(step, {"validation_recall": recall, "validation_loss": loss})
        if not np.isfinite(loss):
            if step == 0:
                raise UserError(
                    f"the closed form's loss on the validation windows is not finite: the logs {log.directory} and"
                    f" {validation.directory} hold numbers that are not; check the checkpoint and --config.dtype, and"
                    " log again to another --config.output"
                )
            return state
        if recall <= float(state["best"]["recall"]):
            return state
        return state | {"best": _best(recall, loss, step, state["network"])}

    checkpoints = directory / "checkpoints"
    # What a full disk or a kill left of a checkpoint is removed.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    with room(checkpoints, resumes=True), ocp.CheckpointManager(checkpoints, options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            logging.info("resumed the fit from step %d of %d", latest, c.steps)
        else:
            network, basis = solved() if solved else solve(c, spec, parts, log)
            state |= {"network": network, "basis": basis}
            state = look(state, 0)
            manager.save(0, args=ocp.args.StandardSave(state))
        diverged = False
        for step in range(int(np.asarray(state["step"])), c.steps):
            if step - int(state["best"]["step"]) >= c.patience * c.evaluate_every:
                break
            batch = log.read(_rows(train, step, c.batch_windows, c.seed))
            state, loss = _update(c.schedule(), c.loss, c.dtype, spec, state, batch)
            done = step + 1
            progress(done, {"loss": float(loss)})
            if diverged := not np.isfinite(loss):  # nor will any later one be
                break
            if done % c.evaluate_every == 0 or done == c.steps:
                state = look(state, done)
            if done % c.checkpoint_every == 0 or done == c.steps:
                manager.save(done, args=ocp.args.StandardSave(state), force=True)
    best = state["best"]
    if diverged or (c.steps and not int(best["step"])):
        what = "training diverged" if diverged else "training did not help"
        logging.warning("step %d of %d is kept: %s; lower --config.fit.learning_rate", best["step"], c.steps, what)
    # Scale and shift follow slowly while the logits under them improve.
    network = calibrate(spec, best["network"], state["basis"], state["row"], _few(c, log))
    network = reproducible()(unwhiten)(network, state["basis"]) | {"row": jnp.asarray(state["row"])}
    return params_of(network, spec), {name: float(best[name]) for name in ("recall", "loss", "step")}


def _initial(c: FitConfig, spec: Spec, parts: ModelParts, log: ActivationLog) -> tuple[dict[str, Any], np.ndarray]:
    """The tables, untrained, and every token's row in those of tokens, which is not trained."""
    row = rows_of(log, c.tokens)
    network = Learned(c.expert_hidden, int(row.max())).init(jax.random.key(c.seed), spec, parts)["network"]
    return {name: table for name, table in network.items() if name != "row"}, row


def _few(c: FitConfig, log: ActivationLog) -> Activations:
    """A few windows, to fit scale and shift to."""
    return log.read(_rows(np.arange(len(log.windows.tokens)), 0, min(c.batch_windows, 4), c.seed))


def _start(c: FitConfig, spec: Spec, network: dict[str, Any], row: np.ndarray) -> dict[str, Any]:
    """Everything that a run carries from step to step, and checkpoints; `network` is in the whitened basis."""
    D, L = spec.d_model, spec.num_layers
    return {
        "step": np.array(0, np.int32),
        "network": network,
        "row": row,
        "basis": {"white": np.zeros((L, D, D), np.float32), "mean": np.zeros((L, D), np.float32)},
        "optimizer": _optimizer(c.schedule()).init(network),
        "best": _best(-1.0, 0.0, 0, network),
    }


def _best(recall: float, loss: float, step: int, network: dict[str, Any]) -> dict[str, Any]:
    numbers = {"recall": np.array(recall, np.float32), "loss": np.array(loss, np.float32)}
    return numbers | {"step": np.array(step, np.int32), "network": network}


@reproducible(static_argnums=(0, 1, 2, 3))
def _update(
    schedule: Schedule, loss: str, dtype: str, spec: Spec, state: dict[str, Any], a: Activations
) -> tuple[dict[str, Any], jax.Array]:
    """One gradient step; the new state and the loss before it."""
    inputs, wanted = window_inputs(spec.norm_eps, a, state["row"]), losses.wanted(spec, a)

    def objective(network):
        logits, margins = score_windows(unwhiten(network, state["basis"]), inputs, spec.top_k, dtype)
        value = losses.total(loss, wanted, logits, margins)
        return (value * wanted.known).sum() / jnp.maximum(wanted.known.sum(), 1)

    value, gradient = jax.value_and_grad(objective)(state["network"])
    updates, optimizer_state = _optimizer(schedule).update(gradient, state["optimizer"], state["network"])
    network = optax.apply_updates(state["network"], updates)
    return state | {"step": state["step"] + 1, "network": network, "optimizer": optimizer_state}, value


@reproducible(static_argnums=(0, 1))
def _sums(loss: str, spec: Spec, state: dict[str, Any], a: Activations) -> jax.Array:
    """Of all known targets of some windows: their number, their recall and their loss, float32 [3]."""
    inputs, wanted = window_inputs(spec.norm_eps, a, state["row"]), losses.wanted(spec, a)
    logits, margins = score_windows(unwhiten(state["network"], state["basis"]), inputs, spec.top_k)
    ranked = jax.lax.top_k(margins, spec.top_k)[1]
    recall = jnp.take_along_axis(wanted.members, ranked, axis=-1).sum(-1) / spec.top_k * wanted.known
    value = losses.total(loss, wanted, logits, margins) * wanted.known
    return jnp.stack([wanted.known.sum().astype(jnp.float32), recall.sum(), value.sum()])


def _optimizer(schedule: Schedule) -> optax.GradientTransformation:
    steps, hidden_rate, direct_rate = schedule

    def adam(rate: float) -> optax.GradientTransformation:
        warmup = min(20, max(steps // 10, 1))
        return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(steps, warmup + 1)), b2=0.98)

    kinds: Any = {"hidden": adam(hidden_rate), "direct": adam(direct_rate)}
    label = lambda network: {n: "hidden" if n in HIDDEN else "direct" for n in network}
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(kinds, label))


def _rows(train: np.ndarray, step: int, batch: int, seed: int) -> np.ndarray:
    """Windows of a step: a pure function of its arguments, so that a resumed run sees the same. Epochs are permuted."""
    places = range(step * batch, (step + 1) * batch)
    epochs = {place // len(train) for place in places}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(train) for epoch in epochs}
    return np.array([orders[place // len(train)][place % len(train)] for place in places])

"""Fits the learned predictor to an activation log: a linear solution in closed form, then gradient descent.

Least squares against the target layers' router logits gets the direct part near its best in one pass over the log,
which thousands of gradient steps would not. Binary cross-entropy on membership in the true top K then trains all of
it, so that the outputs are calibrated probabilities. As residuals are badly conditioned (a few outlier directions
dominate), gradient steps are taken in whitened coordinates; folded back at the end, these cost nothing afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import os
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

from moe_jax.errors import UserError
from moe_jax.prediction.activation_log import ActivationLog, Activations
from moe_jax.prediction.interface import ModelParts, Spec
from moe_jax.prediction.learned import Learned, window_inputs, window_targets


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How a predictor is fitted; `configs/predictor.py` says what the values cost.

    Attributes:
      hidden: width of the hidden layer.
      steps: gradient steps; 0 keeps the closed form.
      batch_windows: windows per step.
      learning_rate: peak rate of the hidden layer; the direct part, already solved for, gets `direct_rate` of it.
      ridge: regularisation of the closed form, relative to the mean square of the inputs.
      evaluate_every: steps between looks at the validation windows; the best of them is kept.
      checkpoint_every: steps between checkpoints.
      patience: looks without a better recall after which training stops.
    """

    hidden: int
    steps: int
    batch_windows: int
    learning_rate: float
    direct_rate: float
    ridge: float
    seed: int
    evaluate_every: int
    checkpoint_every: int
    patience: int


def fit(
    c: FitConfig,
    spec: Spec,
    parts: ModelParts,
    log: ActivationLog,
    validation: np.ndarray,
    directory: str | Path,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
) -> tuple[Any, dict[str, float]]:
    """Trains, or resumes what was killed: the result is the same to the bit.

    Args:
      log: complete.
      validation: bool [W], windows that choose and are not trained on.
      directory: for checkpoints; those of another configuration are refused.
      progress: told the loss at every step, and recall and loss on validation at every look.

    Returns:
      Parameters of `Learned` with the best recall on the validation windows, and {"recall", "loss", "step"} of them.

    Raises:
      UserError: the directory belongs to another run.
    """
    train, held_out = np.flatnonzero(~validation), np.flatnonzero(validation)
    if not len(train):
        raise UserError("there is too little text to train on: give more --text, or lower --config.validation_share")
    learned = Learned(c.hidden)
    optimizer = _optimizer(c)
    params = learned.init(jax.random.key(c.seed), spec, parts)
    eps, network = params["eps"], params["network"]
    loss_and_recall = jax.jit(lambda state, a: _loss(learned, eps, spec, unwhiten(state["network"], state["basis"]), a))

    @jax.jit
    def update(state, activations):
        objective = lambda network: _loss(learned, eps, spec, unwhiten(network, state["basis"]), activations)[0]
        loss, gradient = jax.value_and_grad(objective)(state["network"])
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["network"])
        return state | {"network": optax.apply_updates(state["network"], updates), "optimizer": optimizer_state}, loss

    def look(state, step):
        sums = np.zeros(3)
        for start in range(0, len(held_out), c.batch_windows):
            _, totals = loss_and_recall(state, _padded(log, held_out[start:], c.batch_windows))
            sums += np.asarray(totals, np.float64)
        recall, loss = sums[1] / max(sums[0], 1), sums[2] / max(sums[0], 1)
        progress(step, {"validation_recall": recall, "validation_loss": loss})
        if recall > float(state["best"]["recall"]):
            best = {"recall": np.float32(recall), "loss": np.float32(loss), "step": np.int32(step)}
            return state | {"best": best | {"network": state["network"]}}
        return state

    D, L = spec.d_model, spec.num_layers
    basis = {"white": np.zeros((L, D, D), np.float32), "mean": np.zeros((L, D), np.float32)}
    state: dict[str, Any] = {
        "network": network,
        "optimizer": optimizer.init(network),
        "step": np.int32(0),
        "basis": basis,
    }
    worst = {"recall": np.float32(-1), "loss": np.float32(0), "step": np.int32(0), "network": network}
    state["best"] = worst
    directory = Path(directory).absolute()
    _claim(directory, {"fit": dataclasses.asdict(c), "spec": dataclasses.asdict(spec), **log.identity()})
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(directory / "checkpoints", options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            logging.info("resumed the fit from step %d of %d", latest, c.steps)
        else:
            began = time.time()
            solved, state["basis"] = least_squares(network, eps, spec, log, train, c.ridge, c.batch_windows)
            rows = _rows(train, 0, min(c.batch_windows, 4), c.seed)
            state["network"] = calibrate(learned, eps, spec, solved, state["basis"], log.read(rows))
            logging.info("least squares took %.1f s", time.time() - began)
            state = look(state, 0)
            manager.save(0, args=ocp.args.StandardSave(state))
        for step in range(int(state["step"]), c.steps):
            if step - int(state["best"]["step"]) >= c.patience * c.evaluate_every:
                break
            rows = _rows(train, step, c.batch_windows, c.seed)
            state, loss = update(state, log.read(rows))
            done = step + 1
            state["step"] = np.int32(done)
            progress(done, {"loss": float(loss)})
            if done % c.evaluate_every == 0 or done == c.steps:
                state = look(state, done)
            if done % c.checkpoint_every == 0 or done == c.steps:
                manager.save(done, args=ocp.args.StandardSave(state), force=True)
    best = state["best"]
    network = jax.jit(unwhiten)(best["network"], state["basis"])
    return {"network": network, "eps": eps}, {name: float(best[name]) for name in ("recall", "loss", "step")}


def least_squares(
    network: dict[str, jax.Array], eps: Any, spec: Spec, log: ActivationLog, rows: np.ndarray, ridge: float, batch: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The direct part solved for: linear regression on the target layers' centred router logits.

    Every layer and horizon is a system of its own, of D + 2 E + 1 unknowns per expert.

    Returns:
      The network in whitened coordinates, and the basis: `white` [L, D, D] and `mean` [L, D] of x, for which
      (x - mean) @ white has unit covariance.
    """
    D, E, H = spec.d_model, spec.num_experts, spec.horizon

    @jax.jit
    def moments(a: Activations):
        x, gates, previous = window_inputs(eps, a.residual, a.logits, a.ids, H)
        inputs = jnp.concatenate([x, gates, previous.reshape(*x.shape[:2], -1), jnp.ones_like(x[..., :1])], axis=-1)
        logits = a.logits.astype(jnp.float32)
        wanted, known = window_targets(logits - logits.mean(-1, keepdims=True), a.lengths, H)
        inputs = inputs * known.all(-1, keepdims=True)  # a row counts for all horizons or for none: one matrix
        products = jnp.einsum("lri,lrj->lij", inputs, inputs)
        return products, jnp.einsum("lri,lro->lio", inputs, wanted.reshape(*x.shape[:2], -1))

    products: Any = 0.0
    right: Any = 0.0
    for start in range(0, len(rows), batch):
        part = moments(_padded(log, rows[start:], batch))
        products, right = products + np.asarray(part[0], np.float64), right + np.asarray(part[1], np.float64)
    solved = {name: np.array(network[name]) for name in ("residual", "gates", "previous", "bias")}
    for layer in range(spec.num_layers):
        for h in range(H):
            own = slice(h * E, (h + 1) * E)
            used = np.r_[: D + E, D + E + h * E : D + E + (h + 1) * E, D + E + H * E]
            square = products[layer][np.ix_(used, used)]
            square += np.eye(len(used)) * max(ridge * np.trace(square) / len(used), 1e-6)
            solution = np.linalg.solve(square, right[layer][used, own])
            solved["residual"][layer][:, own] = solution[:D]
            solved["gates"][layer][:, own] = solution[D : D + E]
            solved["previous"][layer][h] = solution[D + E : D + 2 * E]
            solved["bias"][layer][own] = solution[-1]
    whites, means = [], []
    for layer in range(spec.num_layers):
        count = max(products[layer][-1, -1], 1.0)
        mean = products[layer][:D, -1] / count
        values, vectors = np.linalg.eigh(products[layer][:D, :D] / count - np.outer(mean, mean))
        values = np.maximum(values, 1e-4 * values.mean() + 1e-12)  # directions that never vary stay as they are
        whites.append((vectors / np.sqrt(values)) @ vectors.T)
        means.append(mean)
        residual = solved["residual"][layer]
        solved["bias"][layer] += mean @ residual
        solved["residual"][layer] = (vectors * np.sqrt(values)) @ vectors.T @ residual
    basis = {"white": np.stack(whites).astype(np.float32), "mean": np.stack(means).astype(np.float32)}
    return network | {name: jnp.asarray(value, jnp.float32) for name, value in solved.items()}, basis


def unwhiten(network: dict[str, jax.Array], basis: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The same network for inputs as they are: the tables that read x, times the whitening matrix."""
    D, mean = basis["mean"].shape[1], basis["mean"][:, None]
    residual = basis["white"] @ network["residual"]
    hidden_in = jnp.concatenate([basis["white"] @ network["hidden_in"][:, :D], network["hidden_in"][:, D:]], axis=1)
    return network | {
        "residual": residual,
        "hidden_in": hidden_in,
        "bias": network["bias"] - (mean @ residual)[:, 0],
        "hidden_bias": network["hidden_bias"] - (mean @ hidden_in[:, :D])[:, 0],
    }


def calibrate(
    learned: Learned, eps: Any, spec: Spec, network: dict[str, Any], basis: Any, a: Activations, steps: int = 60
) -> dict[str, Any]:
    """Scale and shift of every layer and horizon, fitted to a few windows: regression leaves logits far too flat."""
    plain = network | {"scale": jnp.ones_like(network["scale"]), "shift": jnp.zeros_like(network["shift"])}
    adam = optax.adam(0.1)

    @jax.jit
    def run(plain, basis, a):
        inputs = window_inputs(eps, a.residual, a.logits, a.ids, spec.horizon)
        margins = learned.score_windows(unwhiten(plain, basis), inputs, spec.top_k)
        wanted, known = window_targets(_used(a, spec), a.lengths, spec.horizon)

        def objective(affine):
            scores = margins * affine["scale"][:, None] + affine["shift"][:, None]
            # A sum over layers and horizons: each has its own two numbers.
            return (optax.sigmoid_binary_cross_entropy(scores, wanted).mean(-1) * known).mean(1).sum()

        def step(_, carry):
            updates, optimizer_state = adam.update(jax.grad(objective)(carry[0]), carry[1])
            return optax.apply_updates(carry[0], updates), optimizer_state

        affine = {"scale": plain["scale"], "shift": plain["shift"]}
        return jax.lax.fori_loop(0, steps, step, (affine, adam.init(affine)))[0]

    return network | run(plain, basis, a)


def _used(a: Activations, spec: Spec) -> jax.Array:
    """Multi-hot experts of every token, [W, L, T, E]."""
    return jax.nn.one_hot(a.ids.astype(jnp.int32), spec.num_experts).sum(-2)


def _loss(learned: Learned, eps: Any, spec: Spec, network: Any, a: Activations) -> tuple[jax.Array, jax.Array]:
    """Mean binary cross-entropy; and the sums of known targets, of their recall and of their loss, float32 [3]."""
    inputs = window_inputs(eps, a.residual, a.logits, a.ids, spec.horizon)
    scores = learned.score_windows(network, inputs, spec.top_k)  # [L, R, H, E]
    wanted, known = window_targets(_used(a, spec), a.lengths, spec.horizon)
    losses = optax.sigmoid_binary_cross_entropy(scores, wanted).mean(-1) * known
    ranked = jax.lax.top_k(jax.lax.stop_gradient(scores), spec.top_k)[1]
    recall = jnp.take_along_axis(wanted, ranked, axis=-1).sum(-1) / spec.top_k * known
    count = known.sum()
    return losses.sum() / jnp.maximum(count, 1), jnp.stack([count.astype(jnp.float32), recall.sum(), losses.sum()])


def _optimizer(c: FitConfig) -> optax.GradientTransformation:
    def adam(rate: float) -> optax.GradientTransformation:
        warmup = min(20, max(c.steps // 10, 1))
        return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(c.steps, warmup + 1)), b2=0.98)

    kinds: Any = {"hidden": adam(c.learning_rate), "direct": adam(c.learning_rate * c.direct_rate)}
    label = lambda network: {n: "direct" if n in ("residual", "gates", "previous") else "hidden" for n in network}
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(kinds, label))


def _rows(train: np.ndarray, step: int, batch: int, seed: int) -> np.ndarray:
    """Windows of a step: a pure function of its arguments, so that a resumed run sees the same. Epochs are permuted."""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs = set((places // len(train)).tolist())
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(train) for epoch in epochs}
    return np.array([orders[place // len(train)][place % len(train)] for place in places])


def _padded(log: ActivationLog, rows: np.ndarray, batch: int) -> Activations:
    """The first `batch` of `rows`, filled up with windows of length 0."""
    part = log.read(rows[:batch])
    missing = batch - len(part.lengths)
    return Activations(*(np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in part))


def _claim(directory: Path, run: dict[str, Any]) -> None:
    """Marks checkpoints as of this run; refuses those of another."""
    file, text = directory / "run.json", json.dumps(run, indent=1, sort_keys=True) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        if any(directory.iterdir()):
            raise UserError(f"{directory} is not a fit's folder; choose another --config.output")
        partial = directory.with_name(directory.name + ".run")
        partial.write_text(text)
        os.replace(partial, file)
    elif file.read_text() != text:
        raise UserError(
            f"{directory} holds a fit of other settings, model or text; delete it or choose another --config.output"
        )

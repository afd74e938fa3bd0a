"""Expert compute, and the interface through which a decoder gets expert weights wherever they live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.model.architecture import Activation
from moe_jax.model.primitives import gated
from moe_jax.model.quantized import Matrix, project

Key = tuple[int, int]
"""(layer, expert): the unit of residency. Layers are counted among those that have experts."""


class ExpertWeights(NamedTuple):
    """One expert in the checkpoint's own format and `[out, in]` layout; what a model does not have is None.

    A matrix is an array or, quantised, one of the named tuples of `quantized.py`.
    """

    gate_up: Matrix  # [2F, D]: gate rows, then up rows (or interleaved, as the activation says)
    down: Matrix  # [D, F]
    gate_up_bias: jax.Array | None = None  # [2F]
    down_bias: jax.Array | None = None  # [D]


class Lent(NamedTuple):
    """Experts of a layer, those of them that are on the device."""

    experts: np.ndarray  # int32 [A]; -1 for one that is not there
    weights: tuple[ExpertWeights, ...]  # theirs, [A]; of one that is not there, any other's


class ExpertSource(Protocol):
    """Where the decode loop gets experts from: all resident, or through a byte budget.

    Attributes:
      lends: whether `borrow` ever gives anything. Only to a CPU: on an accelerator what a layer demands might have to
        wait for it, and another executable may round otherwise (seen on an H100).
    """

    @property
    def lends(self) -> bool: ...

    def begin_token(self, token: int) -> None:
        """A decode step, or the prefill (token -1), starts."""
        ...

    def request(self, layer: int, experts: Sequence[int], by_token: np.ndarray | None = None) -> list[int]:
        """States every expert that `layer` needs now, in router order; misses are demanded at once.

        Args:
          by_token: in a prefill, which of them each token of the prompts uses, bool [T, E], the last one last.

        Returns:
          The same experts in the order in which they are best run: resident ones first.
        """
        ...

    def ready(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether `take` would not have to wait for these experts now."""
        ...

    def borrow(self, layer: int, experts: Sequence[int] | None = None) -> Lent | None:
        """Those of these experts that there are, before `layer` states what it needs; they stay until `give_back`.

        Args:
          experts: None: all of the layer.

        Returns:
          None if there are none.
        """
        ...

    def give_back(self, layer: int, needed: Sequence[int], after: jax.Array) -> None:
        """Ends what `borrow` began, once `layer` has requested what it needs; `after` as for `release`.

        Args:
          needed: those of the experts lent that are; they count as taken and released.
        """
        ...

    def take(self, layer: int, experts: Sequence[int]) -> tuple[ExpertWeights, ...]:
        """Blocks until these experts, at most K, can be computed with, and pins them. They may still be on their way,
        where the device waits by itself."""
        ...

    def settle(self) -> None:
        """To be called before the host waits for what is computed with experts: waits for these, and counts it."""
        ...

    def release(self, layer: int, experts: Sequence[int], after: jax.Array) -> None:
        """Unpins them; `after` is ready once the last computation that uses them has completed."""
        ...

    def offer(self, layer: int, probabilities: np.ndarray) -> None:
        """Predicted P(needed), float32 [horizon, E], for layers `layer + 1, ...`, wrapping into the next token.

        Layer -1 means that layer 0 has not run yet: the first row is layer 0's.
        """
        ...

    def wants_prediction(self, cost_s: float) -> bool:
        """Whether predictions that cost so many seconds per token are likely to gain more; asked once per token."""
        ...

    def close(self) -> None:
        """Stops background work. The source is unusable afterwards."""
        ...


def widened(w: ExpertWeights, dtype: Any) -> ExpertWeights:
    """An expert in `dtype`, exactly where that is the wider one.

    Raises:
      UserError: it is quantised; those are widened at each use.
    """
    if isinstance(w.gate_up, tuple):
        raise UserError("--config.offload.upcast=arrival is not for quantised or packed experts; leave it at stage")
    return ExpertWeights(*(None if part is None else part.astype(dtype) for part in w))


def run_expert(x: jax.Array, w: ExpertWeights, activation: Activation) -> jax.Array:
    """One expert on rows x [R, D], computed in x's dtype; gives [R, D]."""
    return project(gated(project(x, w.gate_up, w.gate_up_bias), activation), w.down, w.down_bias)


def run_held(
    activation: Activation,
    outputs: jax.Array,
    h: jax.Array,
    ids: jax.Array,
    experts: jax.Array,
    weights: tuple[ExpertWeights, ...],
) -> tuple[jax.Array, jax.Array]:
    """Runs one token's choices that are among A experts: the call can be made before anyone has read `ids`.

    On a CPU nothing else is computed. The slots of other choices stay as they are.

    Args:
      activation: of every expert.
      outputs: the token's output slots, one for each choice, [K, D]; donated.
      h: normalised residual, [1, D].
      ids: int32 [1, K], the router's choice.
      experts, weights: as in `Lent`.

    Returns:
      The updated slots, and a scalar that is ready exactly when this computation has completed.
    """

    def among(at: jax.Array, own: tuple[ExpertWeights, ...]) -> jax.Array:
        """What expert `at` of `own` gives. In halves, as a branch is handed all weights that are in it."""
        if len(own) == 1:
            return run_expert(h, own[0], activation)
        half = len(own) // 2
        return jax.lax.cond(at < half, lambda: among(at, own[:half]), lambda: among(at - half, own[half:]))

    found = ids[0][:, None] == experts  # [K, A]
    places, there = found.argmax(1), found.any(1)

    def choice(k: jax.Array, outputs: jax.Array) -> jax.Array:
        run = lambda: jax.lax.dynamic_update_slice(outputs, among(places[k], weights).astype(outputs.dtype), (k, 0))
        return jax.lax.cond(there[k], run, lambda: outputs)

    outputs = jax.lax.fori_loop(0, ids.shape[1], choice, outputs)
    return outputs, outputs[0, 0]


def run_chosen(
    activation: Activation,
    outputs: jax.Array,
    h: jax.Array,
    ids: jax.Array,
    experts: tuple[jax.Array, ...],
    weights: tuple[ExpertWeights, ...],
) -> tuple[jax.Array, jax.Array]:
    """Runs A of the experts that one token's router has chosen.

    Args:
      activation, outputs, h, ids: as for `run_held`.
      experts: int32 [] each, the A experts' numbers.
      weights: theirs.

    Returns:
      The updated slots, and a scalar that is ready exactly when this computation has completed.
    """
    for expert, own in zip(experts, weights, strict=True):
        y = run_expert(h, own, activation).astype(outputs.dtype)
        outputs = jnp.where((ids[0] == expert)[:, None], y, outputs)
    return outputs, outputs[0, 0]


def run_experts(
    activation: Activation,
    outputs: jax.Array,
    h: jax.Array,
    rows: jax.Array,
    slots: jax.Array,
    weights: tuple[ExpertWeights, ...],
) -> tuple[jax.Array, jax.Array]:
    """Runs A experts, each on its own token rows; every (token, choice) pair owns one output slot.

    As each output has a slot of its own, experts may run in any order and grouping without changing a bit.

    Args:
      activation: of every expert.
      outputs: slots of all (token, choice) pairs, [R * K, D], slot r * K + k; donated.
      h: normalised residual, [R, D].
      rows: int32 [A, b], token rows of each expert, padded with 0.
      slots: int32 [A, b], where each row's output goes, padded with R * K (written nowhere).
      weights: the A experts.

    Returns:
      The updated slots, and a scalar that is ready exactly when this computation has completed.
    """
    for a, expert in enumerate(weights):
        outputs = outputs.at[slots[a]].set(
            run_expert(h[rows[a]], expert, activation).astype(outputs.dtype), mode="drop"
        )
    return outputs, outputs[0, 0]

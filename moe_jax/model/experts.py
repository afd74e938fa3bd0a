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


class ExpertSource(Protocol):
    """Where the decode loop gets experts from: all resident, or through a byte budget."""

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

    def borrow(self, layer: int, experts: Sequence[int]) -> list[tuple[int, ExpertWeights]]:
        """Those of these experts that are on the device, pinned, before `layer` states what it needs.

        None of them, where computing with an expert before that might hold up what the layer will demand.
        """
        ...

    def give_back(self, layer: int, experts: Sequence[int], needed: Sequence[int], after: jax.Array) -> None:
        """Unpins what was borrowed, once `layer` has requested what it needs; `after` as for `release`.

        Those of them that are `needed` count as taken and released.
        """
        ...

    def take(self, layer: int, experts: Sequence[int]) -> tuple[ExpertWeights, ...]:
        """Blocks until these experts, at most K, are on the device, and pins them."""
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


def run_chosen(
    activation: Activation,
    outputs: jax.Array,
    h: jax.Array,
    ids: jax.Array,
    experts: tuple[jax.Array, ...],
    weights: tuple[ExpertWeights, ...],
) -> tuple[jax.Array, jax.Array]:
    """Runs those of A experts that one token's router has chosen: the call can be made before anyone has read `ids`.

    A CPU skips the others; an accelerator computes them too, and their outputs go nowhere.

    Args:
      activation: of every expert.
      outputs: the token's output slots, one for each choice, [K, D]; donated.
      h: normalised residual, [1, D].
      ids: int32 [1, K], the router's choice.
      experts: int32 [] each, the A experts' numbers.
      weights: theirs.

    Returns:
      The updated slots, and a scalar that is ready exactly when this computation has completed.
    """
    for expert, own in zip(experts, weights, strict=True):
        chosen = (ids[0] == expert)[:, None]

        def run(outputs, chosen=chosen, own=own):
            return jnp.where(chosen, run_expert(h, own, activation).astype(outputs.dtype), outputs)

        def run_if_chosen(outputs, chosen=chosen, run=run):
            return jax.lax.cond(chosen.any(), run, lambda outputs: outputs, outputs)

        outputs = jax.lax.platform_dependent(outputs, cpu=run_if_chosen, default=run)
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

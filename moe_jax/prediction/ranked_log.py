"""A log whose router logits are what the model ranks its experts by, for models where the two differ.

The learned predictor estimates logits and names the largest. A router with a correction bias, or with groups of experts
(DeepSeek-V2 and -V3), chooses others than those of the largest logits: fitted to them, the predictor would be worse
than the routers themselves, which know their own rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.prediction.activation_log import ARRAYS, ActivationLog, Activations
from moe_jax.prediction.interface import ModelParts, Spec
from moe_jax.prediction.membership import evidence


class RankedLog(ActivationLog):
    """The same log, read with `membership.evidence` in the place of the logits."""

    def __init__(self, log: ActivationLog, spec: Spec, corrections: np.ndarray | None):
        self.__dict__.update(vars(log))
        self._correction = None if corrections is None else jnp.asarray(corrections)[:, None]  # [L, 1, E]
        self._evidence = jax.jit(lambda logits, correction: evidence(logits, spec.routing, correction))

    def read(
        self, windows: Sequence[int] | np.ndarray, layer: int | None = None, only: Sequence[str] = ARRAYS
    ) -> Activations:
        a = super().read(windows, layer, only)
        if a.logits is None:
            return a
        correction = self._correction if self._correction is None or layer is None else self._correction[layer]
        return a._replace(logits=np.asarray(self._evidence(a.logits.astype(np.float32), correction)))


def ranked(log: ActivationLog, spec: Spec, parts: ModelParts) -> ActivationLog:
    """What the predictor is fitted to: the log itself where the largest logits are the chosen experts."""
    plain = parts.corrections is None and spec.routing.num_groups == 1
    return log if plain or isinstance(log, RankedLog) else RankedLog(log, spec, parts.corrections)

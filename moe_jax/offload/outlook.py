"""`Outlook`: what is expected to be needed next, and which of it is worth a speculative copy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moe_jax.model.experts import Key


class Outlook:
    """Latest predicted probability of every expert.

    Once its layer has passed, or before anything is known of it, an expert has the prior K / E.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int):
        self.prior = top_k / num_experts
        self._value = np.full((num_layers, num_experts), self.prior, np.float32)
        self._held = np.zeros((num_layers, num_experts), bool)
        # Row l: the layers in the order in which they come after l, and how many layers ahead each is.
        steps = np.arange(1, num_layers + 1)
        self._ahead = (np.arange(num_layers)[:, None] + steps) % num_layers
        self._distance = steps.astype(np.float32)

    def offer(self, layer: int, probabilities: np.ndarray) -> None:
        """Predictions [H, E] for the layers after `layer`, wrapping; they replace earlier ones for these layers.

        Layer -1 means before layer 0: the rows are those of the last layer, layer 0's first.
        """
        targets = self._ahead[layer, : len(probabilities)]
        self._value[targets] = probabilities[: len(targets)]

    def passed(self, layer: int) -> None:
        """`layer` has stated its needs: what was predicted for it is dropped."""
        self._value[layer] = self.prior

    def clear(self) -> None:
        """Drops every prediction."""
        self._value[:] = self.prior

    def hold(self, key: Key, held: bool) -> None:
        """Whether `key` is on the device or on its way."""
        self._held[key] = held

    def forget(self, key: Key) -> None:
        """Not worth a copy until the next prediction (its copy has failed)."""
        self._value[key] = 0.0

    def best(self, layer: int, layers_per_copy: float) -> tuple[Key, float] | None:
        """The absent expert of highest expected value, if any is more likely than the prior; the nearest on ties.

        Args:
          layer: the layer that runs now.
          layers_per_copy: how many layers run in the time of one copy. A copy that arrives late saves only part of
            its time, so the value is the probability times the share of the copy that can be hidden.

        Returns:
          The key and its probability. That, and not its value, is what decides about evictions: an expert that turns
          out to be needed takes somebody's place anyway, sooner or later.
        """
        order = self._ahead[layer]
        value = self._value[order]
        value[self._held[order] | (value <= self.prior)] = 0.0
        if layers_per_copy > 0:
            value *= np.minimum(1.0, self._distance / layers_per_copy)[:, None]
        row, expert = divmod(int(value.argmax()), value.shape[1])
        if value[row, expert] <= 0:
            return None
        key = (int(order[row]), expert)
        return key, float(self._value[key])

    def below(self, keys: Iterable[Key], probability: float) -> list[Key]:
        """Those of `keys` that are less likely to be needed."""
        return [key for key in keys if self._value[key] < probability]

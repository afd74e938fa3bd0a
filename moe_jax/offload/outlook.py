"""`Outlook`: what is expected to be needed next, and which of it is worth a speculative load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_jax.model.experts import Key

WRONG = 2.0
"""What a wrong speculative load costs where the link would have been idle, in loads: it evicts something, and takes its
share of memory bandwidth and of the CPU. Measured from a disk where C is about T: 0.3 to 2 take the same time, and the
less the more loads."""
RATE_TOKENS = 256
"""Uses of an expert are averaged over about so many tokens."""
PRIOR_TOKENS = 32
"""What an expert's rate of use is taken to be before any token counts as much as so many tokens: the
first uses alone would tell too much."""


class Outlook:
    """Latest predicted probability of every expert, and how often each is used.

    Once its layer has passed, or before anything is known of it, an expert has the prior K / E.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int):
        self.prior = top_k / num_experts
        self._value = np.full((num_layers, num_experts), self.prior, np.float32)
        self._rate = np.full((num_layers, num_experts), self.prior, np.float32)  # uses per token
        self._passes = np.full(num_layers, PRIOR_TOKENS)
        self._held = np.zeros((num_layers, num_experts), bool)
        # Row l: the layers in the order in which they come after l, and how many layers ahead each is.
        steps = np.arange(1, num_layers + 1)
        self._ahead = (np.arange(num_layers)[:, None] + steps) % num_layers
        self._distance = steps.astype(np.float32)
        self.busy(1.0)

    def busy(self, share: float) -> None:
        """The link is busy for this share of the time: how much a wrong load costs, hence how likely one must be.

        A right load saves one load on demand; a wrong one costs what it takes from others, `share` of a load, and
        `WRONG`. The least probability at which the first outweighs the second is cost / (1 + cost).
        """
        self._floor = max((share + WRONG) / (1 + share + WRONG), self.prior)

    def offer(self, layer: int, probabilities: np.ndarray) -> None:
        """Predictions [H, E] for the layers after `layer`, wrapping; they replace earlier ones for these layers.

        Layer -1 means before layer 0: the rows are those of the last layer, layer 0's first.
        """
        targets = self._ahead[layer, : len(probabilities)]
        self._value[targets] = probabilities[: len(targets)]

    def passed(self, layer: int, experts: Sequence[int] = ()) -> None:
        """`layer` has stated its needs: what was predicted for it is dropped."""
        self._value[layer] = self.prior
        self._passes[layer] = min(self._passes[layer] + 1, RATE_TOKENS)
        self._rate[layer] *= 1 - 1 / self._passes[layer]
        self._rate[layer, list(experts)] += 1 / self._passes[layer]

    def clear(self) -> None:
        """Drops every prediction."""
        self._value[:] = self.prior

    def hold(self, key: Key, held: bool) -> None:
        """Whether `key` is on the device or on its way."""
        self._held[key] = held

    def forget(self, key: Key) -> None:
        """Not worth a load until the next prediction (its load has failed)."""
        self._value[key] = 0.0

    def likely(self, key: Key) -> bool:
        """Whether it is likely enough for a speculative load."""
        return bool(self._value[key] > self._floor)

    def any_likely(self) -> bool:
        """Whether any absent expert is likely enough for a speculative load."""
        return bool(((self._value > self._floor) & ~self._held).any())

    def best(self, layer: int, layers_per_copy: float, reach: int | None = None) -> tuple[Key, float] | None:
        """The absent expert of highest expected value, if any is likely enough; the nearest on ties.

        Args:
          layer: the layer that runs now.
          layers_per_copy: how many layers run in the time of one load. A load that arrives late saves only part of
            its time, so the value is the probability times the share of the load that can be hidden.
          reach: only experts of so many layers ahead.

        Returns:
          The key and its probability. That, and not its value, is what decides about evictions: an expert that turns
          out to be needed takes somebody's place anyway, sooner or later.
        """
        order = self._ahead[layer, :reach]
        value = self._value[order]
        value[self._held[order] | (value <= self._floor)] = 0.0
        if layers_per_copy > 0:
            value *= np.minimum(1.0, self._distance[:reach] / layers_per_copy)[:, None]
        row, expert = divmod(int(value.argmax()), value.shape[1])
        if value[row, expert] <= 0:
            return None
        key = (int(order[row]), expert)
        return key, float(self._value[key])

    def below(self, table: np.ndarray, probability: float) -> np.ndarray:
        """Of the experts in `table`, bool [L, E], those that are less likely to be needed."""
        return table & (self._value < probability)

    def expected(self, layer: int, table: np.ndarray) -> np.ndarray:
        """Layers until each expert of `table`, bool [L, E], is needed, in expectation: float [count], in its order.

        An expert whose layer is d ahead is needed there with its probability p; otherwise it waits for another token,
        one in 1 / rate of which needs it: d + (1 - p) L / rate.
        """
        count = len(self._value)
        distance = (np.arange(count) - layer - 1) % count + 1
        rate = np.maximum(self._rate, 1e-3)
        return (distance[:, None] + (1 - self._value) * count / rate)[table]

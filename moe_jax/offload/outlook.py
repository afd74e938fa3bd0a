"""`Outlook`: what is expected to be needed next, and which of it is worth a speculative load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_jax.model.experts import Key
from moe_jax.offload.history import Expect, History

WRONG = 0.5
"""What a wrong speculative load costs where the link is idle, in loads: memory bandwidth and CPU."""
TAKEN = 2.0
"""What it costs besides where the link is always busy: a load's time, and that of a load for what it has evicted.
Measured from a disk: 25% of the experts in memory (the link is busy for 0.9 of the time) are fastest with a cost of 2.3
to 3 in all, 70% (0.5 of the time) with 1.5."""
TRUST = 0.5
"""How far what the text has used before corrects predictions, as a power of its odds: the two are not independent."""
LEAST, LEAST_RATE = 1e-3, 0.16
"""No chance is taken to be smaller, or nearer to 1, than the first, and no rate of use smaller than this part of the
average expert's."""


class Outlook:
    """Latest predicted probability of every expert, corrected by what the text has used before.

    Once its layer has passed, until something is predicted for it again, an expert is as likely as `History` says; for
    speculation it then has the prior, K / E.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, expect: Expect | None = None):
        """`expect`: of `History`."""
        self.prior = top_k / num_experts
        self._value = np.full((num_layers, num_experts), self.prior, np.float32)
        self._history = History(num_layers, num_experts, self.prior, expect)
        self._layers, self._said = np.arange(num_layers), np.zeros(num_layers, bool)  # whether it has a prediction
        self._turn = np.zeros(num_layers, int)  # 0: the layer's next use is by the token that runs, 1: by the one after
        # By turn, of what the text has used before: chances, and as odds of what a prediction does not know.
        self._chance = np.full((2, *self._value.shape), self.prior, np.float32)
        self._odds = np.ones_like(self._chance)
        self._rate = self._history.usual()  # uses by a token, of those after
        self._stale = False  # something has been used since these were worked out
        self._prompt = False  # that runs: of its next layers nothing is known but how many experts they need
        # A first layer, and probabilities [H, E] of it and those that come after it, not booked yet.
        self._offered: tuple[int, np.ndarray] | None = None
        self._noted: list[tuple[int, Sequence[int], np.ndarray | None]] = []  # has passed, is not booked yet
        self._held = np.zeros((num_layers, num_experts), bool)
        # Row l: the layers in the order in which they come after l.
        self._ahead = (np.arange(num_layers)[:, None] + np.arange(1, num_layers + 1)) % num_layers
        self.busy(1.0)

    def busy(self, share: float) -> None:
        """The link is busy for this share of the time: how much a wrong load costs, hence how likely one must be.

        A right load saves one load on demand. The least probability at which that outweighs what a wrong one costs is
        cost / (1 + cost).
        """
        cost = WRONG + TAKEN * share
        self._floor = max(cost / (1 + cost), self.prior)

    def offer(self, layer: int, probabilities: np.ndarray) -> None:
        """Predictions [H, E] for the layers after `layer`, wrapping; they replace earlier ones for these layers.

        What the text has used before corrects the odds of what is not certain. That is worked out when next asked: by
        then there may be a newer prediction.

        Layer -1 means before layer 0: the rows are those of the last layer, layer 0's first.
        """
        self.catch_up()
        probabilities, first = probabilities[: len(self._value)].copy(), (layer + 1) % len(self._value)
        if self._offered is not None:
            behind = (self._offered[0] - first) % len(self._value)
            if behind + len(self._offered[1]) > len(probabilities):  # it says something of other layers
                self._take_in()
        self._offered = first, probabilities

    def _take_in(self) -> None:
        """Books what has passed, and what was offered last."""
        self.catch_up()
        if self._offered is not None:
            self._book()

    def _book(self) -> None:
        assert self._offered is not None
        (first, p), self._offered = self._offered, None
        if not self._prompt:
            self._look_back()
        targets = self._ahead[first - 1, : len(p)]
        likely = p * self._odds[self._turn[targets], targets]
        self._value[targets] = likely / (likely + (1 - p))
        self._said[targets] = True

    def passed(self, layer: int, experts: Sequence[int] = (), by_token: np.ndarray | None = None) -> None:
        """`layer` has stated its needs: what was predicted for it is dropped.

        Only noted here, as the layer waits meanwhile; `catch_up` books it.

        Args:
          experts: what it needs.
          by_token: where that is for a whole prompt, what each of its tokens uses: bool [T, E].
        """
        self._noted.append((layer, experts, by_token))

    def catch_up(self) -> None:
        """Books what has passed. To be called where nobody waits for it; otherwise it is done when next asked."""
        for layer, experts, by_token in self._noted:
            if self._offered is not None:
                self._pass_by(layer)
            if layer == 0:
                self._turn[:] = 0
            self._value[layer], self._said[layer], self._turn[layer] = self.prior, False, 1
            last = layer == len(self._value) - 1
            if by_token is None:
                self._history.add(layer, experts)
                self._stale |= last
            else:
                self._history.add_prompt(layer, by_token)
                self._odds[:], self._stale = 1.0, True
            self._prompt = by_token is not None and not last
            if last:
                self._turn[:] = 0
        self._noted.clear()

    def _pass_by(self, layer: int) -> None:
        """What was offered of a layer that has passed is of no use."""
        assert self._offered is not None
        first, probabilities = self._offered
        behind = (layer - first) % len(self._value)
        if behind == 0:
            self._offered = (first + 1) % len(self._value), probabilities[1:]
        elif behind < len(probabilities):  # it is not the turn of this layer
            self._book()

    def _look_back(self) -> None:
        if not self._stale:
            return
        self._stale = False
        if self._prompt:
            self._rate = self._history.usual()
            self._chance[:] = self._rate
            return
        first, second, self._rate = self._history.chances()
        self._chance = np.clip((first, second), LEAST, 1 - LEAST)
        average = self._chance.mean(2, keepdims=True)
        self._odds = (self._chance / (1 - self._chance) * ((1 - average) / average)) ** TRUST

    def clear(self) -> None:
        """Drops every prediction."""
        self._value[:], self._said[:], self._offered = self.prior, False, None

    def hold(self, key: Key, held: bool) -> None:
        """Whether `key` is on the device or on its way."""
        self._held[key] = held

    def forget(self, key: Key) -> None:
        """Not worth a load until the next prediction (its load has failed)."""
        self._take_in()
        self._value[key] = 0.0

    def likely(self, key: Key) -> bool:
        """Whether it is likely enough for a speculative load."""
        self._take_in()
        return bool(self._value[key] > self._floor)

    def any_likely(self) -> bool:
        """Whether any absent expert is likely enough for a speculative load."""
        self._take_in()
        return bool(((self._value > self._floor) & ~self._held).any())

    def best(self, layer: int, reach: int | None = None) -> tuple[Key, float] | None:
        """The absent expert to load next: the likeliest of the nearest layer that has one likely enough, if any does.

        A nearer layer's expert comes first even where a likelier one lies farther ahead: what is left of its load when
        its layer comes is waited for, as all of it would be, and the farther one has time left. So it is faster, and
        moves less, than to go by probability times the share of the load that can still be hidden (measured: 5%).

        Args:
          layer: the layer that runs now.
          reach: only experts of so many layers ahead.

        Returns:
          The key and its probability, which decides about evictions.
        """
        self._take_in()
        if not self._said.any():  # then nothing is likelier than the prior
            return None
        order = self._ahead[layer, :reach]
        value = self._value[order]
        value[self._held[order] | (value <= self._floor)] = 0.0
        row = int(value.any(1).argmax())
        expert = int(value[row].argmax())
        if value[row, expert] <= 0:
            return None
        key = (int(order[row]), expert)
        return key, float(self._value[key])

    def below(self, table: np.ndarray, probability: float) -> np.ndarray:
        """Of the experts in `table`, bool [L, E], those that are less likely to be needed."""
        return table & (self._likelihood() < probability)

    def expected(self, layer: int, table: np.ndarray) -> np.ndarray:
        """Layers until each expert of `table`, bool [L, E], is needed, in expectation: float [count], in its order.

        An expert whose layer is d ahead is needed there with its probability p; otherwise it waits for another token,
        one in 1 / rate of which needs it: d + (1 - p) L / rate.
        """
        likelihood, count = self._likelihood(), len(self._value)
        distance = (np.arange(count) - layer - 1) % count + 1
        rate = np.maximum(self._rate, LEAST_RATE * self.prior)
        return (distance[:, None] + (1 - likelihood) * count / rate)[table]

    def _likelihood(self) -> np.ndarray:
        """Of use at the layer's next turn, float32 [L, E]: as predicted, or as the text lets expect."""
        self._take_in()
        self._look_back()
        return np.where(self._said[:, None], self._value, self._chance[self._turn, self._layers])

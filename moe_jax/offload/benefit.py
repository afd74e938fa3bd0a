"""`Benefit`: whether predicting pays. Prediction costs compute on every layer; where a cache already holds nearly
everything, there is nothing left for it to hide, and the best prefetcher is none."""

from __future__ import annotations

WINDOW = 16
"""Tokens that the averages reach back over, and between two changes of mind."""
TRIAL = 2
"""Tokens that the first decision waits for."""


class Benefit:
    """Weighs what speculation hides, or could hide, against what a prediction costs; one decision per token."""

    def __init__(self):
        self._on = True
        self._tokens = 0  # weighed since the last change of mind
        self._prompt = True
        self._least = TRIAL  # of them before the next one
        self._stall = self._hidden = self._spent = 0.0  # of the token that runs, seconds
        self._average = 0.0
        self._host = 0.0  # average of what was spent

    def hid(self, seconds: float) -> None:
        """Speculation has spared a layer so much waiting."""
        self._hidden += seconds

    def stalled(self, seconds: float) -> None:
        """The decode thread waited."""
        self._stall += seconds

    def spent(self, seconds: float) -> None:
        """The decode thread was busy with a prediction."""
        self._spent += seconds

    def prompt(self) -> None:
        """What has been and is going to be told is not of a token, up to the next question."""
        self._prompt = True

    def pays(self, cost_s: float) -> bool:
        """Whether the next token is worth predictions of `cost_s` seconds, and what the decode thread spends on them
        besides. To be asked once per token.

        While there are predictions, what they have hidden counts; while there are none, all waiting, which is the most
        that they could hide. The gap between the two thresholds keeps the answer from changing with every token.
        """
        gain, spent = self._hidden if self._on else self._stall, self._spent
        self._stall = self._hidden = self._spent = 0.0
        if self._prompt:
            self._prompt = False
            return self._on
        self._tokens += 1
        part = 1 / min(self._tokens, WINDOW)
        self._average += (gain - self._average) * part
        if self._on:
            self._host += (spent - self._host) * part
        cost = cost_s + self._host
        if self._tokens >= self._least and self._on != (self._average > cost * (1 if self._on else 2)):
            self._on = not self._on
            self._tokens, self._least, self._average = 0, WINDOW, 0.0
        return self._on

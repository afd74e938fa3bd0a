"""`History`: what each token used, and what has followed where the text was in such a place before.

Texts repeat themselves: code, tables and lists do, so does what quotes its prompt, and greedy text runs in circles. Two
places at which the same experts were used, at one token and at the one before, are most likely one place of the text
that has come again, and then the tokens after it use the same experts again. This needs no training and does not see
the text: it knows what predictors that look at one token cannot know, several tokens ahead, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SIZE = 256
"""The latest tokens that are remembered, at least."""
RECENT = 16
"""Uses are averaged over about so many tokens. Also a text that does not repeat itself keeps to its subject."""
SHARE = 0.5
"""How much that average says of how often an expert is going to be used; the rest says the layer's average expert."""
ALIKE, SHARPNESS = 0.7, 15.0
"""A place that shares this part of the experts of two tokens with another tells as much as the average does, one that
shares 0.1 more e^1.5 times as much. These and what follows were chosen on the development texts, continued by the
shipped model greedily and at random: the log loss of predictions and the loads of a cache."""
NEAREST = 4
"""Places that are asked at most."""
FOLLOWING, FADING = 20, 0.8
"""Tokens after a place that are looked at, and what each counts compared with the one before it."""


class Chances(NamedTuple):
    """How likely each expert is used, float32 [L, E]."""

    first: np.ndarray  # by the token after the last complete one
    second: np.ndarray  # by the token after that one
    later: np.ndarray  # by each of the tokens from that one on, on average


class History:
    """Of one run after another: what an earlier request used is no worse a memory.

    A decode step is told layer by layer (`add`), a prompt too, for all its tokens at once (`add_prompt`); an incomplete
    one is forgotten when something else begins.
    """

    def __init__(self, num_layers: int, num_experts: int, prior: float):
        self._shape = (num_layers, num_experts)
        self._recent = np.full(self._shape, prior, np.float32)
        self._uses = np.zeros((2 * SIZE, num_layers, num_experts), np.float32)  # 0 or 1, of every token
        self._complete = self._running = 0  # tokens; those of what is incomplete, which follow
        self._next = 0  # layer

    def add(self, layer: int, experts: Sequence[int]) -> None:
        """The token that runs uses these distinct experts of `layer`."""
        self._begin(layer, 1)
        self._uses[self._complete, layer, experts] = 1
        self._recent[layer] *= 1 - 1 / RECENT
        self._recent[layer, experts] += 1 / RECENT
        self._end(layer)

    def add_prompt(self, layer: int, used: np.ndarray) -> None:
        """The tokens of a prompt, the last one last, use these experts of `layer`: bool [T, E]."""
        fading = (1 - 1 / RECENT) ** np.arange(len(used), dtype=np.float32)
        self._recent[layer] *= (1 - 1 / RECENT) ** len(used)
        self._recent[layer] += fading[::-1] @ used.astype(np.float32) / RECENT
        used = used[-SIZE:]
        self._begin(layer, len(used))
        self._uses[self._complete : self._complete + self._running, layer] = used[: self._running]
        self._end(layer)

    def _begin(self, layer: int, tokens: int) -> None:
        if self._running and layer >= self._next:
            return
        self._uses[self._complete : self._complete + self._running] = 0
        if self._complete + tokens > len(self._uses):
            self._uses[:SIZE] = self._uses[self._complete - SIZE : self._complete]
            self._uses[SIZE:] = 0
            self._complete = SIZE
        self._running = tokens

    def _end(self, layer: int) -> None:
        self._next = layer + 1
        if self._next == self._shape[0]:
            self._complete, self._running, self._next = self._complete + self._running, 0, 0

    def usual(self) -> np.ndarray:
        """How likely each expert is used by a token of this text, float32 [L, E], by recent use alone."""
        return SHARE * self._recent + (1 - SHARE) * self._recent.mean(1, keepdims=True)

    def chances(self) -> Chances:
        """What is to be expected after the last complete token."""
        usual, last = self.usual(), self._complete - 1
        if last < 3:
            return Chances(usual, usual, usual)
        uses = self._uses[: last + 1].reshape(last + 1, -1)
        shared = uses @ uses[last - 1 :].T  # [last + 1, 2], with the last token but one and the last one
        likeness = (shared[1:-1, 1] + shared[:-2, 0]) / max(uses[last - 1 :].sum(), 1)  # places 1 to last - 1
        weight = np.exp(SHARPNESS * (likeness - ALIKE))
        places = np.argsort(-weight, kind="stable")[:NEAREST]
        weight, places = weight[places], places + 1
        # Column k: the k-th token after each place; beyond the last token it goes round, as the text would.
        following = places[:, None] + 1 + np.arange(FOLLOWING) % (last - places)[:, None]
        count = np.zeros((3, *following.shape), np.float32)
        count[0, :, 0] = count[1, :, 1] = 1
        count[2, :, 1:] = FADING ** np.arange(FOLLOWING - 1)
        count *= (weight / (1 + weight.sum()))[:, None] / count.sum(2, keepdims=True)
        told = count.reshape(3, -1) @ uses[following.ravel()]
        return Chances(*(told.reshape(3, *self._shape) + usual / (1 + weight.sum())).astype(np.float32))

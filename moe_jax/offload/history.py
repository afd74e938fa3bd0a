"""`History`: what each token used, and what has followed where the text was in such a place before.

Texts repeat themselves: code, tables and lists do, so does what quotes its prompt, and greedy text runs in circles. Two
places at which the same experts were used, at one token and at the one before, are most likely one place of the text
that has come again, and then the tokens after it use the same experts again. This needs no training and does not see
the text: it knows what predictors that look at one token cannot know, several tokens ahead, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.model.experts import Key

SIZE = 256
"""The latest tokens that are remembered, at least."""
SCALES = np.array([4, 16, 64])
"""Uses are averaged over about so many tokens. Also a text that does not repeat itself keeps to its subject."""
REACH = 16
"""What lies further back than so many times that does not count: of a long prompt it is not even looked at."""
YOUNG = 4
"""Tokens that the prior counts as: the first averages reach no further back."""
SHARE = 0.5
"""How much the second average says of how often an expert is going to be used; the rest says the layer's average
expert."""
ALIKE, SHARPNESS = 0.66, 13.0
"""A place that shares this part of the experts of two tokens with another, chance put aside, tells as much as the
average does, one that shares 0.1 more e^1.3 times as much. These and what follows were chosen on the development texts,
continued by the shipped model greedily and at random: the log loss of predictions and the loads of a cache."""
NEAREST = 4
"""Places that are asked at most."""
FOLLOWING, FADING = 20, 0.8
"""Tokens after a place that are looked at, and what each counts compared with the one before it."""


CROWDED = 1.2
"""Where so much more is used than by one token, several texts are decoded together: `Expect` knows single ones."""
Expect = Callable[[np.ndarray], np.ndarray]
"""From averages of use over `SCALES`, float32 [S, L, E], the chance of use by a later token, float32 [L, E]."""


def pace(age: np.ndarray) -> np.ndarray:
    """The part that a token has in each average, float [T, S], by how many came before it: int [T]."""
    return 1 / np.minimum(SCALES, age[:, None] + YOUNG)


def plain(averages: Any) -> Any:
    """What averages [..., S, L, E] say of later use, [..., L, E], without a network."""
    recent = averages[..., 1, :, :]
    return SHARE * recent + (1 - SHARE) * recent.mean(-1, keepdims=True)


class Chances(NamedTuple):
    """How likely each expert is used, float32 [L, E]."""

    first: np.ndarray  # by the token after the last complete one
    second: np.ndarray  # by the token after that one
    later: np.ndarray  # by each of the tokens from that one on, on average


class History:
    """Of one run after another: what an earlier request used is no worse a memory.

    A decode step is told layer by layer (`add`), a prompt too, for all its tokens at once (`add_prompt`). No place is
    looked for in an incomplete one.
    """

    def __init__(self, num_layers: int, num_experts: int, prior: float, expect: Expect | None = None):
        """`expect`: says how often experts will be used, given averages of how often they were; None: `plain` does."""
        self._shape, self._prior, self._expect = (num_layers, num_experts), prior, expect
        self._averages = np.full((len(SCALES), *self._shape), prior, np.float32)
        self._ages = np.zeros(num_layers, int)  # tokens that each layer's averages are of
        self._uses = np.zeros((2 * SIZE, num_layers, num_experts), np.float32)  # 0 or 1, of every token
        self._complete = self._running = 0  # tokens; those of what is incomplete, which follow
        self._next = 0  # layer
        self._token: list[Key] = []  # of the incomplete one, if it is a single one

    def add(self, layer: int, experts: Sequence[int]) -> None:
        """The token that runs uses these distinct experts of `layer`. A device waits for this: it is quick."""
        self._begin(layer, 1)
        self._token += [(layer, expert) for expert in experts]
        if layer == self._shape[0] - 1:
            self._uses[self._complete, *np.array(self._token, int).reshape(-1, 2).T] = 1
            share = pace(self._ages).T[..., None]
            self._averages += share * (self._uses[self._complete] - self._averages)
            self._ages += 1
        self._end(layer)

    def add_prompt(self, layer: int, used: np.ndarray) -> None:
        """The tokens of a prompt, the last one last, use these experts of `layer`: bool [T, E]."""
        self._ages[layer] += len(used)
        used = used[-REACH * SCALES[-1] :].astype(np.float32)
        share = pace(self._ages[layer] + np.arange(-len(used), 0)).astype(np.float32)
        left = np.cumprod(1 - share[::-1], axis=0)[::-1]  # of what was there before each token, in the end
        share[:-1] *= left[1:]
        self._averages[:, layer] *= left[0][:, None]
        self._averages[:, layer] += share.T @ used
        used = used[-SIZE:]
        self._begin(layer, len(used))
        self._uses[self._complete : self._complete + self._running, layer] = used[: self._running]
        self._end(layer)

    def _begin(self, layer: int, tokens: int) -> None:
        if self._running and layer >= max(self._next, 1):
            return
        self._uses[self._complete : self._complete + self._running] = 0
        self._token = []
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
        """How likely each expert is used by a token of this text, float32 [L, E], by how often it was."""
        if self._expect is None or self._averages.mean((1, 2)).max() > CROWDED * self._prior:
            return plain(self._averages)
        return self._expect(self._averages)

    def chances(self) -> Chances:
        """What is to be expected after the last complete token."""
        usual, last = self.usual(), self._complete - 1
        if last < 3:
            return Chances(usual, usual, usual)
        uses = self._uses[: last + 1].reshape(last + 1, -1)
        asked = np.stack([uses[last - 1], uses[last], np.ones_like(uses[last])])
        first, second, size = (uses @ asked.T).T  # shared with the last token but one, with the last one; all
        shared, size, own = second[1:-1] + first[:-2], size[1:-1] + size[:-2], size[last] + size[last - 1]
        more, less = np.maximum(size, own), np.minimum(size, own)
        chance = less / (2 * uses.shape[1])  # where several texts are decoded together, most is shared by chance
        likeness = (shared / np.maximum(more, 1) - chance) / np.maximum(1 - chance, 1e-6)  # of places 1 to last - 1
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

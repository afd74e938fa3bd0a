"""Which windows of a log the regressions of the closed form look at, and whether they are enough."""

from __future__ import annotations

import numpy as np

from moe_jax.prediction.interface import Spec
from moe_jax.prediction.texts import Windows

MOST, WINDOWS = 2**25, 512
"""Estimated logits (128 MiB) and windows that the regressions hold at once, at most."""
PER_UNKNOWN = 20
"""Tokens per unknown that the regressions look at, at least: with 2 of them they do worse than the routers."""


def windows_at_once(length: int, spec: Spec) -> int:
    """How many windows of so many tokens the regressions hold at once."""
    return min(WINDOWS, max(1, MOST // (length * spec.num_layers * spec.num_experts)))


def rows_seen(rows: np.ndarray, windows: Windows, spec: Spec) -> np.ndarray:
    """The windows, of `rows`, that the regressions look at: as many as they hold at once, or as they need if more."""
    step = max(-(-len(rows) // windows_at_once(windows.tokens.shape[1], spec)), 1)
    while step > 1 and _known(windows.lengths[rows[::step]]) < tokens_wanted(spec):
        step -= 1
    return rows[::step]


def tokens_wanted(spec: Spec) -> int:
    """Of how many tokens the regressions can tell their unknowns."""
    return PER_UNKNOWN * (spec.d_model + spec.num_experts + 1)


def too_few(windows: Windows, spec: Spec) -> str | None:
    """Says that the log is too short for the regressions, if it is."""
    if (known := _known(windows.lengths)) >= tokens_wanted(spec):
        return None
    return (
        f"warning: {known:,} tokens for the {spec.d_model + spec.num_experts + 1:,} unknowns of a layer, where"
        f" {tokens_wanted(spec):,} are wanted: the routers may predict better than what is fitted;"
        " raise --config.max_tokens, or give more --text"
    )


def _known(lengths: np.ndarray) -> int:
    """Tokens that have both neighbours in their windows."""
    return int(np.maximum(lengths - 2, 0).sum())

"""Chunks of a prompt whose tokens go to the experts together, so that an expert's weights are read once for all."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from moe_jax.inference.grouping import calls, sizes
from moe_jax.model.decoder import CHUNKS, Routed, Stages
from moe_jax.model.experts import ExpertWeights


class Block:
    """At most CHUNKS chunks in one layer, R token rows each."""

    def __init__(self, stages: Stages, routed: list[Routed], active: list[np.ndarray], alone: bool):
        """
        Args:
          routed: of the chunks; none of them is to be held elsewhere, so that their unused output slots are freed.
          active: of each chunk, bool [R]: rows that are tokens of a prompt.
          alone: the chunk is the prompt's only one, and there is nothing to join.
        """
        self._stages, self._active, self._alone = stages, active, alone
        if alone:
            self._h, self._outputs = routed[0].h, routed[0].outputs
        else:
            chunks = [r.h for r in routed]
            self._h, self._outputs = stages.join(chunks + chunks[:1] * (CHUNKS - len(chunks)))
        self._routed = [r._replace(outputs=self._outputs) for r in routed]

    def ids(self) -> np.ndarray:
        """What the router chose, int32 [chunks * R, K]; waits for it."""
        self._ids = np.concatenate([np.asarray(r.told) for r in self._routed])
        return self._ids

    def run(self, expert: int, weights: ExpertWeights) -> jax.Array | None:
        """Runs an expert on the rows that chose it; gives what is ready when it has, None if there are none."""
        chosen, after = (self._ids == expert) & np.concatenate(self._active)[:, None], None
        for rows, slots in pieces(chosen, len(self._h)):
            self._outputs, after = self._stages.experts(self._outputs, self._h, rows, slots, (weights,))
        return after

    def finish(self) -> list[Routed]:
        """The chunks, with what their experts gave in `outputs`."""
        outputs = [self._outputs] if self._alone else self._stages.split(self._outputs)
        return [r._replace(outputs=filled) for r, filled in zip(self._routed, outputs, strict=False)]


def pieces(chosen: np.ndarray, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The calls for the rows that chose an expert, as `run_experts` takes them.

    Args:
      chosen: bool [R', K], R' <= rows.
      rows: R of the calls' `h`.

    Yields:
      Rows and slots, int32 [1, b], padded with 0 and R * K.
    """
    (row, choice), K = np.nonzero(chosen), chosen.shape[1]
    start = 0
    for size in calls(len(row), sizes(rows)):
        own = row[start : start + size]
        padded_rows, slots = np.zeros((1, size), np.int32), np.full((1, size), rows * K, np.int32)
        padded_rows[0, : len(own)], slots[0, : len(own)] = own, own * K + choice[start : start + size]
        yield padded_rows, slots
        start += size

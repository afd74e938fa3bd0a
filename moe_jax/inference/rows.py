"""Sequences that are appended to at every layer of every token, in little more memory than what they hold."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np

BLOCK = 1024


class _Appended(Sequence):
    """What follows from `_at` and `__len__`."""

    def _at(self, index: int) -> Any:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._at(index % len(self))


class Rows(_Appended):
    """Arrays, copied into blocks: one that is kept as it came may keep a device's buffer, thousands of bytes, alive."""

    def __init__(self, rows: Iterable[np.ndarray] = ()):
        self._blocks: list[np.ndarray] = []
        self._starts: list[int] = []  # by block, of its first row
        self._count = 0
        for row in rows:
            self.append(row)

    def append(self, row: Any) -> None:
        """`row`: an array; where shape or dtype change, a new block begins."""
        row = np.asarray(row)
        at = self._count - self._starts[-1] if self._blocks else BLOCK
        if at == BLOCK or self._blocks[-1].shape[1:] != row.shape or self._blocks[-1].dtype != row.dtype:
            self._blocks.append(np.empty((BLOCK, *row.shape), row.dtype))
            self._starts.append(self._count)
            at = 0
        self._blocks[-1][at] = row
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def _at(self, index: int) -> np.ndarray:
        block = bisect.bisect_right(self._starts, index) - 1
        return self._blocks[block][index - self._starts[block]]


class Lists(_Appended):
    """Lists of small integers."""

    def __init__(self, lists: Iterable[Sequence[int]] = ()):
        self._numbers, self._ends = array("i"), array("q")
        for numbers in lists:
            self.append(numbers)

    def append(self, numbers: Sequence[int]) -> None:
        """Of any length."""
        self._numbers.extend(numbers)
        self._ends.append(len(self._numbers))

    def __len__(self) -> int:
        return len(self._ends)

    def _at(self, index: int) -> list[int]:
        return self._numbers[self._ends[index - 1] if index else 0 : self._ends[index]].tolist()

"""`KeySet`: experts in a table. Thousands may be on the device, and the loader often has to choose among them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

import numpy as np

from moe_jax.model.experts import Key


class KeySet(Collection[Key]):
    """The keys where `table`, bool [L, E], is true, in order of layer and expert."""

    def __init__(self, table: np.ndarray):
        self.table = table

    def __len__(self) -> int:
        return int(np.count_nonzero(self.table))

    def __iter__(self) -> Iterator[Key]:
        return zip(*(axis.tolist() for axis in np.nonzero(self.table)), strict=True)

    def __contains__(self, key: object) -> bool:
        return bool(self.table[cast(Key, key)])

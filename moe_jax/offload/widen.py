"""`WidenedBank`: experts that take the compute dtype when they arrive, instead of at each use.

Then a bfloat16 expert takes twice its bytes of a budget, but the link still carries the narrow ones, and float32
products need no widening: faster only where the budget holds (nearly) everything even so.
"""

from __future__ import annotations

from typing import Any

import jax

from moe_jax.model.experts import ExpertWeights, Key, widened
from moe_jax.offload.bank import Transfer


class WidenedBank:
    """A bank over another. Attributes as of `Bank`; `bank` is the narrow one."""

    def __init__(self, bank: Any, spec: ExpertWeights, dtype: Any):
        """`spec`: an expert of `bank`, as arrays or `jax.ShapeDtypeStruct`s; `dtype`: what matrices become."""
        self.bank, self._dtype = bank, dtype
        self.expert_bytes = widened_bytes(spec, dtype)
        self.link_bytes = bank.link_bytes

    def start(self, key: Key) -> Transfer:
        """The narrow transfer, widened at its end."""
        return _Widening(self.bank.start(key), self._dtype)

    def copy(self, key: Key) -> ExpertWeights:
        """The narrow copy, widened; asynchronous where the narrow one is."""
        return _widen(self.bank.copy(key), self._dtype)

    def close(self) -> None:
        """Closes the narrow bank."""
        self.bank.close()


class _Widening:
    def __init__(self, transfer: Transfer, dtype: Any):
        self._transfer, self._dtype = transfer, dtype
        self.slices, self.size, self.move, self.prepare = (
            transfer.slices,
            transfer.size,
            transfer.move,
            transfer.prepare,
        )

    def finish(self) -> ExpertWeights:
        return jax.block_until_ready(_widen(self._transfer.finish(), self._dtype))


def widened_bytes(spec: ExpertWeights, dtype: Any) -> int:
    """Bytes of an expert once it is widened; raises as `widened`."""
    wide = jax.eval_shape(lambda weights: widened(weights, dtype), spec)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(wide))


_widen = jax.jit(widened, static_argnums=1)

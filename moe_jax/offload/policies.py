"""Eviction policies: small pure things, testable from a table."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from moe_jax.model.experts import Key


class Eviction(Protocol):
    """Which of the resident experts to give up.

    A state passed to `on_use` is consumed, as a donated array is: go on with the one returned. `on_use` hears of every
    expert that a layer needs, resident or not, and of every speculative load, in an order that is independent of
    timing; the state may hence know experts that are not resident.
    """

    def init(self) -> Any:
        """The state before any use."""
        ...

    def on_use(self, state: Any, key: Key) -> Any:
        """The state after `key` was needed or speculatively loaded."""
        ...

    def victim(self, state: Any, candidates: Collection[Key]) -> Key:
        """The member of `candidates` (not empty; membership tests are fast) to evict."""
        ...


class LRU:
    """Evicts what was used least recently; what was never used goes first. The state is a dict in order of use."""

    def init(self) -> dict[Key, None]:
        """No uses."""
        return {}

    def on_use(self, state: dict[Key, None], key: Key) -> dict[Key, None]:
        """Moves `key` to the recent end."""
        state.pop(key, None)
        state[key] = None
        return state

    def victim(self, state: dict[Key, None], candidates: Collection[Key]) -> Key:
        """The least recent candidate."""
        never_used = next((key for key in candidates if key not in state), None)
        return never_used or next(key for key in state if key in candidates)

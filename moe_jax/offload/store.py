"""`ArrayStore`: experts on the device under a byte budget. Bookkeeping only: no threads, no copies, no waiting.

An expert's bytes count from the start of its copy until the last computation that uses it has completed:

    begin ─► in flight ─ commit ─► resident ─ evict ─► draining ─ settle ─► gone
                └─────── abort ──────────────────────────────────────────────┘
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence

import jax
import numpy as np

from moe_jax.model.experts import ExpertWeights, Key, Lent
from moe_jax.offload.policies import Eviction, Expected
from moe_jax.trace import Load


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A resident (or draining) expert."""

    weights: ExpertWeights
    load: Load
    pins: int = 0
    # Each is ready once a computation that uses this expert has completed.
    uses: list[jax.Array] = dataclasses.field(default_factory=list)

    def idle(self) -> bool:
        """Whether every computation that uses it has completed."""
        if self.uses:
            self.uses = [use for use in self.uses if not is_ready(use)]
        return not self.uses


class ArrayStore:
    """One immutable device array per expert part, all experts of equal size.

    Every change of the books is checked: passing the budget, or evicting what is pinned, raises RuntimeError.

    Attributes:
      unpinned: bool [L, E], the resident experts without a pin; to be read.
    """

    def __init__(
        self, budget_bytes: int, expert_bytes: int, policy: Eviction, shape: tuple[int, int], per_layer: int = 0
    ):
        """
        Args:
          shape: (L, E) of the model.
          per_layer: experts that one layer may have at most; 0: as many as the budget holds.

        Raises:
          ValueError: the budget does not hold a single expert.
        """
        if budget_bytes < expert_bytes:
            raise ValueError(f"a budget of {budget_bytes} bytes holds no expert of {expert_bytes} bytes")
        self.budget_bytes, self.expert_bytes = budget_bytes, expert_bytes
        self.capacity = budget_bytes // expert_bytes
        self.per_layer = per_layer or self.capacity
        self._of_layer: Counter[int] = Counter()
        self.resident: dict[Key, Entry] = {}
        self.in_flight: dict[Key, Load] = {}
        self.draining: list[Entry] = []
        self.unpinned = np.zeros(shape, bool)
        self._in_use: dict[Key, Entry] = {}  # resident, and when last looked at still computed with
        self._lent: dict[int, list[int]] = {}  # experts, by layer
        self._lent_uses: dict[int, list[jax.Array]] = {}  # by layer; each is ready once all that was lent is idle again
        self.peak_bytes = 0
        self._policy, self._state = policy, policy.init()

    @property
    def used_bytes(self) -> int:
        """Resident, in flight, and evicted but still computed with."""
        return (len(self.resident) + len(self.in_flight) + len(self.draining)) * self.expert_bytes

    def fits(self) -> bool:
        """Whether the budget has room for one more expert now."""
        return self.used_bytes + self.expert_bytes <= self.budget_bytes

    def layer_full(self, layer: int) -> bool:
        """Whether `layer` has all the experts that it may have: one more of it needs one of it to go."""
        return self._of_layer[layer] >= self.per_layer

    def has_room(self, key: Key) -> bool:
        """Whether this expert fits now."""
        return self.fits() and not self.layer_full(key[0])

    def holds(self, key: Key) -> bool:
        """Resident or in flight."""
        return key in self.resident or key in self.in_flight

    def begin(self, key: Key, load: Load) -> None:
        """Books the bytes of a copy that is about to start."""
        if self.holds(key) or not self.has_room(key):
            raise RuntimeError(f"expert {key} is already on its way" if self.holds(key) else "device budget passed")
        self.in_flight[key] = load
        self._of_layer[key[0]] += 1
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def commit(self, key: Key, weights: ExpertWeights) -> None:
        """The copy has arrived."""
        self.resident[key] = Entry(weights, self.in_flight.pop(key))
        self.unpinned[key] = True

    def abort(self, key: Key) -> None:
        """The load failed or was given up, and holds no memory any more."""
        self.in_flight.pop(key).gone = True
        self._of_layer[key[0]] -= 1

    def begin_anew(self) -> None:
        """The policy forgets what was used."""
        self._state = self._policy.init()

    def use(self, key: Key, needed: bool = True) -> None:
        """Tells the policy that `key` is needed, or was worth a speculative load."""
        self._state = self._policy.on_use(self._state, key, needed)

    def pin(self, key: Key) -> ExpertWeights:
        """Guards a resident expert, which something is to compute with, against eviction until as many `unpin`."""
        if key[0] in self._lent:
            raise RuntimeError(f"expert {key} is taken before what was borrowed of its layer is given back")
        entry = self.resident[key]
        entry.pins += 1
        entry.load.used = True
        self.unpinned[key] = False
        return entry.weights

    def unpin(self, key: Key, after: jax.Array) -> None:
        """Undoes one `pin`; the expert is in use until `after` is ready."""
        entry = self.resident.get(key)
        if entry is None or not entry.pins:
            raise RuntimeError(f"expert {key} is released but was not taken")
        entry.pins -= 1
        self.unpinned[key] = not entry.pins
        entry.idle()  # forgets completed uses, so that the list stays short
        entry.uses.append(after)
        self._in_use[key] = entry

    def lend(self, layer: int, experts: Sequence[int] | None) -> Lent | None:
        """Guards these experts of a layer (None: all), those that are here, against eviction until `give_back`.

        None if there are none.
        """
        asked = range(self.unpinned.shape[1]) if experts is None else experts
        entries = [self.resident.get((layer, expert)) for expert in asked]
        here = [expert for expert, entry in zip(asked, entries, strict=True) if entry is not None]
        if not here:
            return None
        self._lent[layer] = here
        for expert in here:
            self.unpinned[layer, expert] = False
        other = self.resident[layer, here[0]].weights
        there = [-1 if entry is None else expert for expert, entry in zip(asked, entries, strict=True)]
        weights = tuple([other if entry is None else entry.weights for entry in entries])
        return Lent(np.array(there, np.int32), weights)

    def give_back(self, layer: int, after: jax.Array) -> None:
        """Undoes one `lend`; all that was lent is in use until `after` is ready."""
        for expert in self._lent.pop(layer):
            self.unpinned[layer, expert] = True
        self._lent_uses.setdefault(layer, []).append(after)
        self._still_lent(layer)  # forgets completed uses, so that the list stays short

    def _still_lent(self, layer: int) -> list[jax.Array]:
        """What to wait for until nothing computes with what was lent of a layer."""
        uses = self._lent_uses.get(layer)
        if uses:
            uses[:] = [use for use in uses if not is_ready(use)]
        return uses or []

    def unpin_all(self) -> None:
        """Drops every pin. The runtime itself keeps the memory of a computation that still runs."""
        self._lent.clear()
        if np.count_nonzero(self.unpinned) < len(self.resident):
            for key, entry in self.resident.items():
                entry.pins = 0
                self.unpinned[key] = True

    def idle(self, table: np.ndarray) -> np.ndarray:
        """Of resident experts, bool [L, E]: those that no running computation uses."""
        self._in_use = {key: entry for key, entry in self._in_use.items() if not entry.idle()}
        table = table.copy()
        for key in self._in_use:
            table[key] = False
        for layer in self._lent_uses:
            if self._still_lent(layer):
                table[layer] = False
        return table

    def victim(self, candidates: Collection[Key], expected: Expected) -> Key:
        """The policy's choice among resident, unpinned keys."""
        return self._policy.victim(self._state, candidates, expected)

    def evict(self, key: Key) -> None:
        """Gives up a resident expert; its bytes count until its last use has completed."""
        if not self.unpinned[key]:
            raise RuntimeError(f"expert {key} is pinned and cannot be evicted")
        entry = self.resident.pop(key)
        entry.load.gone = True
        entry.uses = entry.uses + self._still_lent(key[0])
        self.draining.append(entry)
        self.unpinned[key] = False
        self._in_use.pop(key, None)
        self._of_layer[key[0]] -= 1
        self.settle()

    def clear(self) -> None:
        """Drops everything, whatever it is used for."""
        for load in (*self.in_flight.values(), *(entry.load for entry in self.resident.values())):
            load.gone = True
        self.resident.clear()
        self.draining.clear()
        self._in_use.clear()
        self._lent.clear()
        self._lent_uses.clear()
        self.unpinned[:] = False

    def settle(self) -> None:
        """Frees the draining experts whose last use has completed."""
        if not self.draining:
            return
        busy = []
        for entry in self.draining:
            if entry.idle():
                # Frees the memory even where a caller forgot to drop its reference; using it again raises.
                for array in jax.tree.leaves(entry.weights):
                    array.delete()
            else:
                busy.append(entry)
        self.draining = busy


def is_ready(array: jax.Array) -> bool:
    """Whether the computation or copy that makes `array` has completed."""
    return array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]  (missing from jax's own stub)

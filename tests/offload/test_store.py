"""The store's books against a simple model."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_jax.model.experts import ExpertWeights, Key
from moe_jax.offload.keys import KeySet
from moe_jax.offload.policies import LRU
from moe_jax.offload.store import ArrayStore
from moe_jax.trace import Load
from tests.offload.rig import Computation

SIZE = 10
SHAPE = 2, 3
KEYS = [(layer, expert) for layer in range(2) for expert in range(3)]


class _Part:
    """Stands for a device array."""

    def __init__(self):
        self.deleted = False

    def delete(self):
        assert not self.deleted
        self.deleted = True


Part: Any = _Part


def load(key: Key):
    return Load(*key, "demand", SIZE, 0, 0.0)


def weights():
    return ExpertWeights(Part(), Part())


def unasked(keys):
    raise AssertionError("LRU asked what is expected")


class StoreMachine(RuleBasedStateMachine):
    """Every expert that ever began is a record: its phase, its pins, the computations that use it, its arrays."""

    def __init__(self):
        super().__init__()
        self.store = ArrayStore(3 * SIZE + 5, SIZE, LRU(), SHAPE)
        self.phase, self.pins, self.uses, self.parts, self.order = {}, {}, {}, {}, []
        self.gone = []  # (uses, arrays) of the evicted
        self.most = 0

    def used(self):
        return len(self.phase) + sum(any(not use.is_ready() for use in uses) for uses, _ in self.gone)

    def keys(self, phase, unpinned=False):
        return [key for key, at in self.phase.items() if at == phase and not (unpinned and self.pins[key])]

    @rule(key=st.sampled_from(KEYS))
    def begin(self, key):
        self.store.settle()
        if key in self.phase or self.used() == 3:
            with pytest.raises(RuntimeError, match="on its way" if key in self.phase else "budget"):
                self.store.begin(key, load(key))
            return
        self.store.begin(key, load(key))
        self.phase[key], self.pins[key], self.uses[key] = "flight", 0, []
        self.most = max(self.most, self.used())

    @precondition(lambda self: self.keys("flight"))
    @rule(data=st.data(), fails=st.sampled_from([False, False, True]))
    def land(self, data, fails):
        key = data.draw(st.sampled_from(self.keys("flight")))
        if fails:
            self.store.abort(key)
            del self.phase[key]
        else:
            self.parts[key] = weights()
            self.store.commit(key, self.parts[key])
            self.phase[key] = "resident"

    @precondition(lambda self: self.keys("resident"))
    @rule(data=st.data())
    def pin(self, data):
        key = data.draw(st.sampled_from(self.keys("resident")))
        assert self.store.pin(key) is self.parts[key]
        self.pins[key] += 1

    @rule(key=st.sampled_from(KEYS))
    def unpin(self, key):
        if self.phase.get(key) != "resident" or not self.pins[key]:
            with pytest.raises(RuntimeError, match="not taken"):
                self.store.unpin(key, Computation())
            return
        use = Computation()
        self.store.unpin(key, use)
        self.pins[key] -= 1
        self.uses[key].append(use)

    @rule(key=st.sampled_from(KEYS))
    def use(self, key):
        self.store.use(key)
        self.order = [other for other in self.order if other != key] + [key]

    @rule(data=st.data())
    def end_a_computation(self, data):
        running = [use for uses in [*self.uses.values(), *(uses for uses, _ in self.gone)] for use in uses]
        running = [use for use in running if not use.is_ready()]
        if running:
            data.draw(st.sampled_from(running)).end()

    @precondition(lambda self: self.keys("resident"))
    @rule()
    def evict(self):
        candidates = self.keys("resident", unpinned=True)
        for key in set(self.keys("resident")) - set(candidates):
            with pytest.raises(RuntimeError, match="pinned"):
                self.store.evict(key)
        if candidates:
            key = self.store.victim(dict.fromkeys(candidates), unasked)
            assert key == min(candidates, key=lambda k: self.order.index(k) if k in self.order else -1)
            self.store.evict(key)
            del self.phase[key], self.pins[key]
            self.gone.append((self.uses.pop(key), self.parts.pop(key)))

    @invariant()
    def books_agree(self):
        self.store.settle()
        assert self.store.used_bytes == self.used() * SIZE <= self.store.budget_bytes
        assert self.store.peak_bytes == self.most * SIZE
        assert self.store.fits() == (self.used() < 3) and all(map(self.store.has_room, KEYS)) == (self.used() < 3)
        assert set(self.store.resident) == set(self.keys("resident"))
        unpinned = self.keys("resident", unpinned=True)
        assert list(KeySet(self.store.unpinned)) == sorted(unpinned) and len(KeySet(self.store.unpinned)) == len(
            unpinned
        )
        idle = [key for key in unpinned if all(use.is_ready() for use in self.uses[key])]
        assert list(KeySet(self.store.idle(self.store.unpinned))) == sorted(idle)
        assert all(self.store.holds(key) == (key in self.phase) for key in KEYS)
        for uses, parts in self.gone:
            busy = any(not use.is_ready() for use in uses)
            assert [part.deleted for part in jax.tree.leaves(parts)] == 2 * [not busy]
        assert not any(part.deleted for part in jax.tree.leaves(self.parts))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_budget_for_no_expert_is_refused():
    with pytest.raises(ValueError, match="no expert"):
        ArrayStore(SIZE - 1, SIZE, LRU(), SHAPE)


def test_real_arrays_are_freed_even_where_a_caller_kept_them():
    store = ArrayStore(SIZE, SIZE, LRU(), SHAPE)
    store.begin((0, 0), load((0, 0)))
    store.commit((0, 0), ExpertWeights(jnp.ones(3), jnp.ones(3)))
    kept = store.pin((0, 0))
    store.unpin((0, 0), jnp.zeros(()).block_until_ready())
    store.evict((0, 0))
    assert kept.gate_up.is_deleted() and kept.down.is_deleted() and store.used_bytes == 0


def test_every_overlapping_use_counts():
    store = ArrayStore(SIZE, SIZE, LRU(), SHAPE)
    store.begin((0, 0), load((0, 0)))
    store.commit((0, 0), weights())
    first, second = Computation(), Computation()
    for use in (first, second):
        store.pin((0, 0))
        store.unpin((0, 0), use)
    store.evict((0, 0))
    second.end()
    store.settle()
    assert store.used_bytes == SIZE
    first.end()
    store.settle()
    assert store.used_bytes == 0


def test_completed_uses_do_not_pile_up():
    store = ArrayStore(SIZE, SIZE, LRU(), SHAPE)
    store.begin((0, 0), load((0, 0)))
    store.commit((0, 0), weights())
    for _ in range(100):
        store.pin((0, 0))
        store.unpin((0, 0), Computation(seconds=0))
    assert len(store.resident[0, 0].uses) == 1


def test_dropping_all_pins_leaves_everything_evictable():
    store = ArrayStore(SIZE, SIZE, LRU(), SHAPE)
    store.begin((0, 0), load((0, 0)))
    store.commit((0, 0), weights())
    store.pin((0, 0))
    store.pin((0, 0))
    store.unpin_all()
    store.evict((0, 0))
    assert store.used_bytes == 0

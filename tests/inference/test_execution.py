"""Execution modes against a slow reference, and the same bits whatever the timing."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.errors import UserError
from moe_jax.inference import execution, metrics
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.inference.rows import Lists, Rows
from moe_jax.inference.state import Record
from moe_jax.model.architecture import Routing
from moe_jax.model.decoder import Routed, Stages, device_weights
from moe_jax.model.router import choose
from moe_jax.offload.bank import HostBank
from moe_jax.offload.source import Mode, OffloadedExperts
from moe_jax.prediction import predictors
from tests import reference
from tests.tiny import TINY, write_tiny

MODES = ("speculative", "speculative_gated", "hybrid", "cache_aware")
RECALL = [0.9, 0.3, 0.8, None, 0.5]  # of the layers of TINY
SETTINGS = {"recall": RECALL, "threshold": 0.5, "bonus": 0.7, "capacity": 40}
PROMPT, STEPS, ROWS = 9, 8, 2


class Tiny:
    """One checkpoint, and the parts that its engines share."""

    def __init__(self, directory):
        self.checkpoint = HFCheckpoint(directory)
        self.weights = reference.read(directory)
        self.a = a = self.checkpoint.architecture
        self.stages = Stages(a, jnp.float32)
        self.dense = device_weights(self.checkpoint.dense(), jnp.float32)
        self.bank = HostBank(self.checkpoint)
        self.resident = ResidentExperts(self.checkpoint)

    @functools.cache  # noqa: B019
    def engine(self, mode: str, predictor: str = "router") -> Engine:
        loaded = predictors.load(predictor, 3, "", self.a, self.dense)
        assert loaded
        made = execution.make(mode, self.a, self.dense, loaded[0], **SETTINGS)
        return Engine(self.stages, self.dense, self.resident, loaded, execution=made)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(write_tiny(tmp_path_factory.mktemp("model")))


def texts(rows: int = 1) -> list[list[int]]:
    """Of unequal lengths; the shortest has PROMPT + STEPS tokens."""
    rng = np.random.default_rng(1)
    return [rng.integers(3, TINY.vocab_size, PROMPT + STEPS + 4 * row).tolist() for row in range(rows)]


def run(engine: Engine, rows: list[list[int]]) -> np.ndarray:
    """Logits [STEPS + 1, B, V]: all but the last STEPS tokens of each row prefilled, these decoded one by one."""
    logits, state = engine.prefill([row[:-STEPS] for row in rows], STEPS)
    out = [np.asarray(logits)]
    for step in range(STEPS):
        tokens = np.zeros(len(state.lengths), np.int32)
        tokens[: len(rows)] = [row[step - STEPS] for row in rows]
        out.append(np.asarray(engine.decode(tokens, state)))
    return np.stack(out)


class Slow:
    """The modes in float64 NumPy, token by token; `forward` runs again over the whole text for each."""

    def __init__(self, mode: str, a, weights):
        self.mode, self.a, self.w = mode, a, weights
        self.decided: dict[tuple[int, int], np.ndarray] = {}  # (layer, position) -> gates [E]
        self.lru: list[tuple[int, int]] = []  # least recently used first
        self.departed: list[bool] = []

    def run(self, text: list[int]) -> np.ndarray:
        start = len(text) - STEPS
        logits, chosen = reference.forward(self.a, self.w, text[:start])
        for layer in range(self.a.num_layers):
            self._use(layer, chosen[layer].reshape(-1))
        out = [logits[-1]]
        for position in range(start, len(text)):
            override = functools.partial(self._override, text, start, position)
            out.append(reference.forward(self.a, self.w, text[: position + 1], override)[0][-1])
        return np.stack(out)

    def _override(self, text, start, position, layer, residual, logits, gates):
        for earlier in range(start, position):
            gates[earlier] = self.decided[layer, earlier]
        true = set(np.flatnonzero(gates[position]))
        before = self.w["model.embed_tokens.weight"][text[position]] if layer == 0 else self.residual
        self.residual = residual[position].copy()
        ids, source = self._choose(layer, before, logits[position], gates[position])
        weights = np.exp(source[ids] - source[ids].max())
        gates[position] = 0
        gates[position][ids] = weights / weights.sum()
        self.decided[layer, position] = gates[position].copy()
        self.departed.append(set(ids) != true)
        self._use(layer, ids)

    def _choose(self, layer, before, logits, gates):
        """Expert ids, and the logits that their gates are made of."""
        exact = np.argsort(-logits)[: self.a.top_k], logits
        if self.mode == "cache_aware":
            there = np.array([(layer, e) in self.lru for e in range(self.a.num_experts)])
            return np.argsort(-(logits + SETTINGS["bonus"] * there))[: self.a.top_k], logits
        if self.mode == "hybrid" and (RECALL[layer] is None or RECALL[layer] < SETTINGS["threshold"]):
            return exact
        p = f"model.layers.{layer}."
        h = self.w[p + "post_attention_layernorm.weight"] * before
        h = h / np.sqrt((before * before).mean() + self.a.norm_eps)
        predicted = self.w[p + "block_sparse_moe.gate.weight"] @ h
        ids = np.argsort(-predicted)[: self.a.top_k]
        return ids, predicted if self.mode == "speculative" else logits

    def _use(self, layer, experts):
        for expert in experts.tolist():
            if (layer, expert) in self.lru:
                self.lru.remove((layer, expert))
            self.lru = [*self.lru, (layer, expert)][-SETTINGS["capacity"] // ROWS :]


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_slow_reference(tiny, mode):
    rows = texts(ROWS)
    engine = tiny.engine(mode)
    engine.record = Record()
    logits = run(engine, rows)
    record, engine.record = engine.record, None
    slow = [Slow(mode, tiny.a, tiny.weights) for _ in rows]
    for row, text in enumerate(rows):
        expected = slow[row].run(text)
        np.testing.assert_allclose(logits[:, row], expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    departed = np.mean([row.departed for row in slow])
    assert 0.05 < departed < 0.95 and metrics.departed(record) == pytest.approx(departed)


@pytest.mark.parametrize("predictor", ["router", "repeat"])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_whatever_the_timing(tiny, mode, predictor):
    rows, engine = texts(3), tiny.engine(mode, predictor)
    expected = run(engine, rows)
    try:
        runs: list[tuple[int, Mode]] = [(2, "thread"), (9, "thread"), (12, "inline"), (35, "thread")]
        for seed, (experts, issue) in enumerate(runs):
            rng = random.Random(seed)
            delay = lambda key, rng=rng: rng.choice([0.0, 0.0, 0.0005, 0.002])
            budget = experts * tiny.bank.expert_bytes
            engine.source = source = OffloadedExperts(tiny.bank, tiny.a, budget, mode=issue, delay=delay)
            try:
                for _ in range(2):  # the second time with whatever the first left on the device
                    assert expected.tobytes() == run(engine, rows).tobytes()
                assert source.store.peak_bytes <= budget
            finally:
                source.close()
    finally:
        engine.source = tiny.resident


def test_planned_experts_are_stated_at_the_layer_before(tiny):
    class Watched(ResidentExperts):
        def __init__(self):
            self.__dict__.update(tiny.resident.__dict__)
            self.calls = []

        def request(self, layer, experts, by_token=None):
            self.calls.append((layer, sorted(experts)))
            return super().request(layer, experts)

        def offer(self, layer, probabilities):
            self.calls.append((layer, np.flatnonzero(probabilities[0] == 1).tolist()))

    engine = tiny.engine("speculative_gated")
    engine.source = watched = Watched()
    try:
        [text] = texts()
        _, state = engine.prefill([text], 1)
        watched.calls.clear()
        engine.decode(np.array([7], np.int32), state)
    finally:
        engine.source = tiny.resident
    offered, requested = watched.calls[:-1:2], watched.calls[1::2]
    assert (
        [layer for layer, _ in offered]
        == [layer - 1 for layer, _ in requested]
        == list(range(-1, tiny.a.num_layers - 1))
    )
    assert [experts for _, experts in offered] == [experts for _, experts in requested]
    assert watched.calls[-1] == (tiny.a.num_layers - 1, [])  # the next token's layer 0 is not planned by this one


ROUTINGS = [
    Routing(2),
    Routing(3, renormalise=False),
    Routing(3, scoring="softmax_chosen"),
    Routing(3, scoring="sigmoid", scale=2.5),
    Routing(2, scoring="sigmoid", correction_bias=True, num_groups=4, groups_kept=2, group_score="top2"),
]


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_gates_follow_the_routers_rule(routing):
    logits = jax.random.normal(jax.random.key(0), (5, 8))
    correction = jnp.arange(8) / 8 if routing.correction_bias else None
    ids, gates = choose(logits, routing, correction)
    np.testing.assert_array_equal(execution.regate(logits, ids, routing), gates)
    others = jnp.tile(jnp.arange(routing.top_k)[::-1], (5, 1))
    if routing.renormalise:
        np.testing.assert_allclose(execution.regate(logits, others, routing).sum(-1), routing.scale, rtol=1e-6)


def test_the_bonus_is_a_bound(tiny):
    aware = execution.CacheAware(Routing(2), 0.5, 3, 1, 4)
    memory = aware.start(np.array([[[[2, 3]]]]))

    def decide(*logits):
        unused = jnp.zeros(())
        routed = Routed(unused, unused, jnp.array([logits], jnp.float32), unused, unused, unused, unused)
        return aware.decide(0, routed, None, memory, np.array([True]))[0][0].tolist()

    assert sorted(decide(1.0, 0.9, 0.45, -1.0)) == [0, 2]  # 0.45 lower than 0.9, and there
    assert sorted(decide(1.0, 0.9, 0.35, -1.0)) == [0, 1]
    # 3 was used least recently when 1 came: now 0, 1 and 2 are there.
    np.testing.assert_array_equal(memory[0].resident, [[1, 1, 1, 0]])


def test_no_bonus_and_a_perfect_plan_depart_from_nothing(tiny):
    rows = texts(2)
    exact = run(Engine(tiny.stages, tiny.dense, tiny.resident), rows)
    aware = execution.make("cache_aware", tiny.a, tiny.dense, None, bonus=0.0, capacity=12)
    same = run(Engine(tiny.stages, tiny.dense, tiny.resident, execution=aware), rows)
    np.testing.assert_allclose(same, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    none_planned = execution.Planned(tiny.a.routing, [False] * tiny.a.num_layers, False)
    loaded = predictors.load("router", 3, "", tiny.a, tiny.dense)
    assert (
        run(Engine(tiny.stages, tiny.dense, tiny.resident, loaded, execution=none_planned), rows).tobytes()
        == exact.tobytes()
    )


def test_what_a_mode_lacks_is_said(tiny):
    make = functools.partial(execution.make, a=tiny.a, dense=tiny.dense)
    with pytest.raises(UserError, match="there is no predictor"):
        make("speculative", predictor=None)
    with pytest.raises(UserError, match="no recall on validation text is stored for predictor repeat"):
        make("hybrid", predictor=predictors.Repeat())
    with pytest.raises(UserError, match="is of a model of 2 layers, this one has 5"):
        make("hybrid", predictor=predictors.Repeat(), recall=[0.5, 0.5])
    with pytest.raises(UserError, match="offload.tier=host"):
        make("cache_aware", predictor=None)
    assert make("exact", predictor=None) is None


def test_recall_is_of_the_true_experts_where_there_was_a_prediction():
    record = Record(active=Rows([np.array([True])] * 2), lengths=Rows([np.array([1])] * 2))
    record.needed = Lists([[0, 1], [2, 3], [0, 1], [2, 3]])
    nothing = np.array([-1, -1])
    record.guessed = Rows(
        [nothing, nothing, np.array([2, 0]), nothing]
    )  # only the second token's layer 0 speaks of its layer 1
    assert metrics.recall(record, 2) == 0.5
    record.routed = Rows([np.array([[0, 1]])] * 3 + [np.array([[0, 2]])])  # what ran was something else
    assert metrics.recall(record, 2) == 1.0
    record.ids = Rows([np.array([needed]) for needed in record.needed])
    assert metrics.departed(record) == 0.5

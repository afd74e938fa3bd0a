"""The resident engine against the slow dense reference: prefill, decode, batches, and what ends a row."""

from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moe_jax
from moe_jax.checkpoint.families import mixtral
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.errors import UserError
from moe_jax.inference.block import pieces
from moe_jax.inference.engine import Engine
from moe_jax.inference.grouping import arities, assign, bucket, calls, padded, sizes, used_by_token
from moe_jax.inference.resident import ResidentExperts
from moe_jax.inference.state import Record
from moe_jax.model.decoder import Stages, device_weights
from moe_jax.model.experts import Lent
from moe_jax.prediction import predictors
from tests import reference
from tests.prediction.tiny_predictor import write_predictor
from tests.tiny import SIZES, TINY, write_tiny

on_a_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="elsewhere experts share calls, and none runs ahead"
)


@pytest.fixture(scope="module", params=["tied", "wide"])
def model(request, tmp_path_factory):
    """(directory, architecture, engine): tied embeddings and K = 2, or K = 3 with one key/value head."""
    changes = {"tied": dict(tie_embeddings=True), "wide": dict(top_k=3, num_kv_heads=1, num_layers=3)}[request.param]
    a = mixtral.architecture(**{**SIZES, **changes})
    directory = write_tiny(tmp_path_factory.mktemp("model"), a)
    return directory, a, make_engine(directory)


def make_engine(directory, **options) -> Engine:
    checkpoint = HFCheckpoint(directory)
    stages = Stages(checkpoint.architecture, jnp.float32)
    return Engine(stages, device_weights(checkpoint.dense(), jnp.float32), ResidentExperts(checkpoint), **options)


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, TINY.vocab_size, n).tolist() for n in lengths]


def greedy(engine: Engine, rows, steps: int) -> np.ndarray:
    """Logits [steps + 1, rows, V] of a greedy run."""
    logits, state = engine.prefill(rows, steps)
    out = [np.asarray(logits)]
    for _ in range(steps):
        out.append(np.asarray(engine.decode(out[-1].argmax(-1).astype(np.int32), state)))
    return np.stack(out)[:, : len(rows)]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


class Watched(ResidentExperts):
    """Keeps what it is offered, and what had been requested by then."""

    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.requested, self.offered = 0, []
        self.wanted = iter(lambda: True, False)  # for ever

    def wants_prediction(self, cost_s):
        return next(self.wanted)

    def request(self, layer, experts, by_token=None):
        self.requested += 1
        return super().request(layer, experts)

    def offer(self, layer, probabilities):
        self.offered.append((self.requested, layer, np.array(probabilities)))


def test_a_predictor_speaks_before_layer_0_has_stated_its_needs(model):
    directory, a, plain = model
    checkpoint = HFCheckpoint(directory)
    source, dense = Watched(checkpoint), plain.dense
    engine = Engine(plain.stages, dense, source, predictors.load("router", 2, "", a, checkpoint.dense()))
    [prompt] = prompts([5])
    logits, state = engine.prefill([prompt], 2)
    source.requested, source.offered = 0, []
    decoded = engine.decode(np.array([7], np.int32), state)
    assert [(n, layer) for n, layer, _ in source.offered] == [(max(i, 0), i - 1) for i in range(a.num_layers + 1)]
    assert engine.forecast is not None
    spec, params, router = engine.forecast.spec, engine.forecast.params, predictors.Router()
    expected, _ = router.begin(
        params, router.init_state(spec, 1), dense["embedding"][jnp.array([7])], np.array([7], np.int32)
    )
    np.testing.assert_allclose(source.offered[0][2], expected.probability[0], atol=1e-6)
    _, state = plain.prefill([prompt], 2)
    assert np.asarray(decoded).tobytes() == np.asarray(plain.decode(np.array([7], np.int32), state)).tobytes()


class Counting(predictors.Router):
    """Says how often it was asked, in hundredths."""

    def prime(self, spec, ids, step=0):
        return jnp.zeros(ids.shape[1])

    def apply(self, params, state, features):
        prediction, _ = super().apply(params, state, features)
        return prediction._replace(probability=0 * prediction.probability + state[:, None, None] / 100), state + 1

    def begin(self, params, state, embedding, tokens):
        prediction, _ = super().begin(params, state, embedding, tokens)
        return prediction._replace(probability=0 * prediction.probability + state[:, None, None] / 100), state + 1


@pytest.mark.parametrize("early", [False, True])
def test_each_prediction_sees_the_memory_of_the_one_before(model, early):
    directory, a, plain = model
    checkpoint = HFCheckpoint(directory)
    source, router = Watched(checkpoint), predictors.load("router", 2, "", a, checkpoint.dense())
    assert router is not None
    engine = Engine(plain.stages, plain.dense, source, (Counting(), *router[1:]))
    _, state = engine.prefill(prompts([5]), 4)
    source.offered = []
    for tokens in (jnp.array([7], jnp.int32), jnp.array([8], jnp.int32)):
        if early:
            engine.enter(tokens, state)
        engine.decode(tokens, state)
    asked = [round(100 * float(said[0, 0])) for _, _, said in source.offered]
    assert asked == list(range(2 * (a.num_layers + 1)))


@pytest.mark.parametrize("case", ["as entered", "other tokens", "a row has ended"])
def test_a_step_entered_early_is_the_same_step(model, case):
    directory, a, plain = model
    checkpoint = HFCheckpoint(directory)
    predictor = predictors.load("router", 2, "", a, checkpoint.dense())
    tokens, others = jnp.arange(7, 15, dtype=jnp.int32), jnp.full(8, 9, jnp.int32)  # three rows, padded

    def two_steps(early: bool):
        source = Watched(checkpoint)
        engine = Engine(plain.stages, plain.dense, source, predictor)
        _, state = engine.prefill(prompts([5, 3, 9]), 4)
        out = []
        for _ in range(2):
            if early:
                engine.enter(others if case == "other tokens" else tokens, state)
                assert not out or source.offered[-1][1] == a.num_layers - 1  # until `decode` comes, nothing happens
            if case == "a row has ended":
                state.active = np.arange(8) == 1
            out.append(np.asarray(engine.decode(tokens, state)))
        return np.stack(out)[:, state.active], source.offered

    (expected, said), (found, also_said) = two_steps(False), two_steps(True)
    assert found.tobytes() == expected.tobytes()
    assert len(said) == len(also_said)
    for (n, layer, before), (m, other, after) in zip(said, also_said, strict=True):
        assert (n, layer) == (m, other) and before.tobytes() == after.tobytes()


@on_a_cpu
@pytest.mark.parametrize("missing", [None, 0, 1])
def test_a_prediction_is_offered_before_a_wait_and_after_work(model, missing, monkeypatch):
    """`missing`: which of a layer's experts, one call each, has to be waited for."""
    directory, a, plain = model
    checkpoint, calls = HFCheckpoint(directory), []
    monkeypatch.setattr("moe_jax.inference.calls.LARGE_EXPERT", 0)
    source = Watched(checkpoint)
    record = Record()
    needed = lambda layer, expert: record.needed[layer].index(expert)
    monkeypatch.setattr(source, "ready", lambda layer, experts: needed(layer, *experts) != missing)
    monkeypatch.setattr(
        source, "take", lambda layer, experts: calls.append("take") or Watched.take(source, layer, experts)
    )
    monkeypatch.setattr(source, "offer", lambda layer, probabilities: calls.append(f"offer {layer}"))
    monkeypatch.setattr(source, "borrow", lambda layer, experts: None)
    engine = Engine(plain.stages, plain.dense, source, predictors.load("router", 2, "", a, checkpoint.dense()))
    _, state = engine.prefill(prompts([5]), 2)
    calls.clear()
    engine.record = record
    engine.decode(np.array([7], np.int32), state)
    order = ["take"] * a.top_k
    order.insert(a.top_k if missing is None else missing, "offer {}")
    assert calls == ["offer -1", *(call.format(layer) for layer in range(a.num_layers) for call in order)]


HELD = {
    "all": lambda needed, others: needed + others,
    "what is needed": lambda needed, others: needed,
    "one of it": lambda needed, others: [others[0], needed[-1]],
    "what is not needed": lambda needed, others: others,
    "nothing": lambda needed, others: [],
}


class Lending(Watched):
    """Of each layer only some experts are there when it begins, as `held` says."""

    def __init__(self, checkpoint, held):
        super().__init__(checkpoint)
        self.held, self.calls = iter(held), []

    def borrow(self, layer, experts=None):
        here = next(self.held)
        asked = range(len(self._experts[layer])) if experts is None else experts
        self.calls.append(("borrow", layer, experts))
        if not set(here) & set(asked):
            return None
        there = [expert if expert in here else -1 for expert in asked]
        # Where one is not there, any other: it must not matter which.
        return Lent(np.array(there, np.int32), tuple(self._experts[layer][e if e >= 0 else max(there)] for e in there))

    def request(self, layer, experts, by_token=None):
        self.calls.append(("request", layer, list(experts)))
        return super().request(layer, experts)

    def give_back(self, layer, needed, after):
        self.calls.append(("give_back", layer, list(needed)))

    def take(self, layer, experts):
        self.calls.append(("take", layer, list(experts)))
        return super().take(layer, experts)


class Watching(ResidentExperts):
    """Notes what is asked of it."""

    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.calls = []

    def request(self, layer, experts, by_token=None):
        self.calls.append(("request", layer))
        return super().request(layer, experts, by_token)

    def take(self, layer, experts):
        self.calls.append(("take", layer))
        return super().take(layer, experts)

    def settle(self):
        self.calls.append(("settle", -1))


def test_what_was_taken_is_waited_for_only_before_the_next_choice_is_read(model):
    directory, a, plain = model
    source = Watching(HFCheckpoint(directory))
    greedy(Engine(plain.stages, plain.dense, source), prompts([5]), 2)
    kinds = [kind for kind, _ in source.calls]
    layers = ["settle", "request", "take"]
    per_step = [k for i, k in enumerate(kinds) if k != "take" or kinds[i - 1] != "take"]
    # After the last layer of a prompt its last token's row is read; after that of a step the caller reads.
    assert per_step == layers * a.num_moe_layers + ["settle"] + 2 * (layers * a.num_moe_layers)


@on_a_cpu
@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("held", HELD)
def test_what_is_there_runs_before_the_choice_is_known_and_changes_no_bit(model, held, predicted, monkeypatch):
    directory, a, plain = model
    monkeypatch.setattr("moe_jax.inference.calls.LARGE_EXPERT", 0)
    apart = Engine(plain.stages, plain.dense, plain.source)
    apart.record = Record()
    monkeypatch.setattr(plain.source, "lends", False)
    expected = greedy(apart, prompts([5]), 3)
    needed = apart.record.needed
    others = [[expert for expert in range(a.num_experts) if expert not in here] for here in needed]
    here = [HELD[held](*both) for both in zip(needed, others, strict=True)]

    checkpoint = HFCheckpoint(directory)
    source = Lending(checkpoint, here)
    router = predictors.load("router", 1, "", a, plain.dense) if predicted else None
    engine = Engine(plain.stages, plain.dense, source, router)
    logits, state = engine.prefill(prompts([5]), 3)
    found, source.calls, source.requested, source.offered = [np.asarray(logits)], [], 0, []
    for _ in range(3):
        found.append(np.asarray(engine.decode(found[-1].argmax(-1).astype(np.int32), state)))
    assert np.stack(found).tobytes() == expected.tobytes()
    order = []
    for i, (use, there) in enumerate(zip(needed, here, strict=True)):
        layer = i % a.num_moe_layers
        asked = None
        if predicted:  # the likeliest, as offered before
            [*_, likely] = [probabilities[0] for n, _, probabilities in source.offered if n == i]
            asked = np.argsort(likely)[-2 * a.top_k :].tolist()
        ahead = [expert for expert in use if expert in there and (asked is None or expert in asked)]
        anything = set(there) & set(range(a.num_experts) if asked is None else asked)
        order += [("borrow", layer, asked), ("request", layer, use)]
        order += [("give_back", layer, ahead)] if anything else []
        order += [("take", layer, [expert]) for expert in use if expert not in ahead]
    assert source.calls == order


@pytest.mark.parametrize("rows, large, lends", [(2, True, True), (1, False, True), (1, True, False)])
def test_nothing_runs_ahead_in_a_batch_or_where_experts_share_calls(model, rows, large, lends, monkeypatch):
    directory, a, plain = model
    if large:
        monkeypatch.setattr("moe_jax.inference.calls.LARGE_EXPERT", 0)
    source = Watched(HFCheckpoint(directory))
    source.lends = lends
    monkeypatch.setattr(source, "borrow", lambda *args: pytest.fail("it would change how something is calculated"))
    engine = Engine(plain.stages, plain.dense, source, predictors.load("router", 1, "", a, plain.dense))
    greedy(engine, prompts([5] * rows), 2)
    assert source.offered


def test_whether_predictions_pay_is_asked_once_a_step(model, monkeypatch):
    directory, a, plain = model
    source = Watched(HFCheckpoint(directory))
    engine = Engine(plain.stages, plain.dense, source, predictors.load("router", 2, "", a, plain.dense))
    _, state = engine.prefill(prompts([5, 3]), 4)
    asked = []
    monkeypatch.setattr(source, "wants_prediction", lambda cost_s: not asked.append(cost_s))
    for step in range(3):
        tokens = jnp.arange(8, dtype=jnp.int32)
        engine.enter(tokens, state)
        state.active = np.arange(8) < (2 if step < 1 else 1)  # one row ends: the step is entered again
        engine.decode(tokens, state)
        assert len(asked) == step + 1


def test_weights_that_are_no_numbers_end_a_run_no_more_than_without_predictor(tmp_path):
    directory = write_tiny(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if "layers.2" in name and "experts.3" in name)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, directory / "model.safetensors")

    def ids(predictor):
        with closing(moe_jax.load(str(directory), prefetch={"predictor": predictor}, max_seq_len=64)) as model:
            generation = model.start(["one two three"], 6)
            for _ in generation:
                pass
            return generation.outputs[0].token_ids, model.metrics(generation)["recall"]

    (alone, _), (predicted, recall) = ids("none"), ids("router")
    assert predicted == alone and (recall is None or 0 <= recall <= 1)


@pytest.mark.parametrize("name", ["learned", "router"])  # one remembers the last token, one nothing
def test_a_predictor_that_was_not_asked_for_a_while_is_told_what_it_has_missed(model, name, tmp_path):
    directory, a, plain = model
    checkpoint = HFCheckpoint(directory)
    write_predictor(tmp_path, checkpoint, horizon=2)

    loaded = predictors.load(name, 2, str(tmp_path), a, plain.dense)
    engine = Engine(plain.stages, plain.dense, plain.source, loaded)

    def offered(*wanted):
        engine.source = source = Watched(checkpoint)
        _, state = engine.prefill(prompts([5, 3]), 9)
        source.wanted, found = iter(wanted), []
        for token in range(len(wanted)):
            source.offered = []
            engine.decode(np.array([token + 7, 3 * token, *[0] * 6], np.int32), state)
            found.append([probabilities for _, _, probabilities in source.offered])
        return found

    always, now_and_then = offered(*[True] * 6), offered(True, False, False, True, True, True)
    assert [bool(step) for step in now_and_then] == [True, False, False, True, True, True]
    # What `learned` keeps of the last tokens cannot be told afterwards; it is there again two tokens later.
    for step in (0, 3, 4, 5) if name == "router" else (0, 5):
        np.testing.assert_array_equal(now_and_then[step], always[step])


@pytest.mark.parametrize("length", [1, 2, 31, 33, 140])
def test_prefill_then_decode_equals_the_full_forward_pass(model, length):
    directory, a, engine = model
    weights = reference.read(directory)
    [prompt] = prompts([length])
    engine.record = Record()
    logits = greedy(engine, [prompt], 5)
    record, engine.record = engine.record, None
    sequence = prompt + [int(row.argmax()) for row in logits[:-1, 0]]
    full, chosen = reference.forward(a, weights, sequence)
    close(logits[:, 0], full[length - 1 :])
    decoded = np.stack(record.ids).reshape(5, a.num_layers, a.top_k)
    np.testing.assert_array_equal(decoded, chosen[:, length:].swapaxes(0, 1))


def test_a_batch_equals_its_prompts_one_by_one(model):
    _, _, engine = model
    rows = prompts([3, 60, 17])
    together = greedy(engine, rows, 4)
    for row, prompt in enumerate(rows):
        close(together[:, row], greedy(engine, [prompt], 4)[:, 0])


def test_chunks_do_not_change_the_result(model):
    directory, _, engine = model
    rows = prompts([100, 90])
    close(greedy(make_engine(directory, prefill_chunk=64), rows, 3), greedy(engine, rows, 3))


def test_rows_that_ended_change_nothing_for_the_others(model):
    _, _, engine = model
    rows = prompts([9, 5])
    expected = greedy(engine, rows, 3)
    logits, state = engine.prefill(rows, 3)
    tokens = np.asarray(logits).argmax(-1).astype(np.int32)
    state.active = np.arange(8) == 0
    for step in range(1, 4):
        logits = np.asarray(engine.decode(tokens, state))
        close(logits[0], expected[step, 0])  # fewer rows in a bucket may round differently
        tokens = logits.argmax(-1).astype(np.int32)
    assert state.lengths.tolist() == [12, 5, *[0] * 6]


def test_prompts_that_do_not_fit_are_refused(model):
    _, _, engine = model
    with pytest.raises(UserError, match="empty"):
        engine.prefill([[]], 1)
    with pytest.raises(UserError, match="context of 256"):
        engine.prefill(prompts([256]), 1)
    engine.prefill(prompts([255]), 1)


@pytest.mark.parametrize("token", [-1, SIZES["vocab_size"], 2**31 - 1])
def test_a_token_that_the_model_does_not_know_is_refused(model, token):
    """A look-up would give the last embedding there is."""
    _, _, engine = model
    with pytest.raises(UserError, match=f"gives token {token}, and the model has {SIZES['vocab_size']}"):
        engine.prefill([[1, 2], [3, token, 4]], 3)


@pytest.mark.parametrize("rows", [32, 100, 2048])
def test_every_choice_of_an_expert_is_in_one_call(rows):
    chosen = np.random.default_rng(0).random((rows - 3, 2)) < 0.3
    found = [pair for used, slots in pieces(chosen, rows) for pair in zip(used[0], slots[0], strict=True)]
    real = [(row, slot) for row, slot in found if slot < 2 * rows]
    assert [(slot // 2, slot % 2) for _, slot in real] == [*zip(*np.nonzero(chosen), strict=True)]
    assert all(slot // 2 == row for row, slot in real) and {pair for pair in found if pair not in real} <= {
        (0, 2 * rows)
    }


def test_grouping():
    assert [arities(n, 2) for n in (1, 2, 5)] == [[1], [2], [2, 2, 1]]
    assert arities(13, 8) == [8, 4, 1] and arities(6, 6) == [4, 2] and arities(3, 1) == [1, 1, 1]
    assert [bucket(n, 256) for n in (1, 2, 3, 8, 9, 33, 200)] == [1, 8, 8, 8, 32, 128, 256]
    assert [bucket(n, 8) for n in (1, 2, 3, 8)] == [1, 2, 8, 8] and bucket(3, 4) == 4
    assert [sizes(n) for n in (1, 32, 256, 2048)] == [(1,), (1, 8, 32), (8, 32, 128, 256), (32, 128, 256)]
    assert sizes(1 << 20) == (256,)
    many = sizes(2048)
    assert [calls(n, many) for n in (0, 1, 33, 100, 150, 200)] == [(), (32,), (32, 32), (128,), (128, 32), (256,)]
    assert calls(555, many) == (256, 256, 32, 32)
    assert [padded(n) for n in (1, 2, 8, 9, 17)] == [1, 8, 8, 16, 32]
    ids = np.array([[4, 1], [1, 0], [2, 4]])
    rows, slots = assign(ids, np.array([True, True, False]), [1, 4], 4)
    assert rows.tolist() == [[0, 1], [0, 0]] and slots.tolist() == [[1, 2], [0, 6]]


def test_the_source_learns_what_every_token_of_a_prompt_used(model, monkeypatch):
    _, a, engine = model
    lengths, told, routed = [40, 3, 17], [], {}
    original = engine.source.request

    def request(layer, experts, by_token=None):
        told.append(by_token)
        return original(layer, experts, by_token)

    monkeypatch.setattr(engine.source, "request", request)
    monkeypatch.setattr(engine, "prefill_chunk", 64)  # several chunks
    rows = prompts(lengths)
    for row in rows:  # alone, its routing is as among others
        engine.prefill([row], 2, sink=lambda layer, c, r: routed.setdefault(layer, []).append(np.asarray(r.ids)))
    ids = {layer: np.concatenate(found).reshape(-1, a.top_k) for layer, found in routed.items()}
    told.clear()
    engine.prefill(rows, 2)
    assert [used.shape for used in told] == [(40, a.num_experts)] * a.num_moe_layers
    for layer, used in enumerate(told):
        alone, start = [], 0
        for length in lengths:
            chunk = engine.shapes([length], 2)[1]
            alone.append(ids[layer][start : start + length])
            start += -(-length // chunk) * chunk
        for ago in range(1, 41):  # tokens before the end
            expected = {e for own in alone if len(own) >= ago for e in own[-ago].tolist()}
            assert set(np.flatnonzero(used[-ago]).tolist()) == expected
    engine.decode(np.zeros(8, np.int32), engine.prefill(rows, 2)[1])
    assert told[-1] is None  # a decode step is one token


def test_prompts_end_together():
    ids = np.array([[[0, 1], [2, 3], [4, 5]], [[1, 2], [9, 9], [9, 9]]])
    used = used_by_token(ids, np.array([3, 1]), 10)
    assert [np.flatnonzero(row).tolist() for row in used] == [[0, 1], [2, 3], [1, 2, 4, 5]]

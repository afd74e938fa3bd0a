"""The first invariant: offloaded logits are bitwise those of the resident engine, whatever the timing."""

import dataclasses
import random
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_jax
from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.converted import Converted
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.model.architecture import Routing
from moe_jax.model.decoder import Stages, device_weights
from moe_jax.offload.bank import HostBank
from moe_jax.offload.disk import DiskBank
from moe_jax.offload.policies import LFU, LRU, LeastStale, Predicted
from moe_jax.offload.source import OffloadedExperts
from moe_jax.prediction import predictors, usage
from moe_jax.prediction.interface import Spec, fingerprint
from tests.prediction.tiny_predictor import write_predictor
from tests.tiny import TINY, write_tiny

PREDICTORS = ("none", "random", "router", "repeat", "frequency", "learned")


class Setting:
    """One checkpoint with everything that may be shared between runs."""

    def __init__(self, directory, predictor_directory):
        self.checkpoint = HFCheckpoint(directory)
        self.a = a = self.checkpoint.architecture
        self.stages = Stages(a, jnp.float32)
        self.dense = device_weights(self.checkpoint.dense(), jnp.float32)
        self.resident = Engine(self.stages, self.dense, ResidentExperts(self.checkpoint))
        self.bank = HostBank(self.checkpoint)
        convert(self.checkpoint, bank := directory.parent / f"{directory.name}-bank")
        self.converted = Converted(bank)
        identity = fingerprint(a, self.checkpoint.dense())
        self.usage = usage.stored(predictor_directory, Spec.of(a, 1), identity)
        self.smallest = a.top_k * self.bank.expert_bytes
        # Engines are kept, so that each predictor is compiled once.
        self.engines = {
            name: Engine(
                self.stages,
                self.dense,
                ResidentExperts(self.checkpoint),
                predictors.load(name, 4, predictor_directory, a, self.dense),
            )
            for name in PREDICTORS
        }

    def call_apart(self, apart: bool) -> None:
        """Whether every expert has a call of its own, as large ones do; likely ones then run ahead."""
        for engine in (self.resident, *self.engines.values()):
            engine.calls.together = 1 if apart else self.a.top_k

    def offloaded(self, predictor: str, budget: int, mode, delays: int | None) -> tuple[Engine, OffloadedExperts]:
        rng = random.Random(delays)
        delay = None if delays is None else (lambda key: rng.choice([0.0, 0.0, 0.0005, 0.002]))
        engine = self.engines[predictor]
        bank, how, threads = self.bank, mode, 1
        if mode == "disk":  # in slices so small that several make an expert: reads are interrupted and resumed
            bank, how, threads = DiskBank(self.converted, slice_bytes=4096), "thread", rng.choice([1, 2, 3])
        budget = budget // self.bank.expert_bytes * bank.expert_bytes
        policy = rng.choice([LRU, LFU, LeastStale, Predicted])()
        source = OffloadedExperts(
            bank, self.a, budget, policy=policy, mode=how, delay=delay, threads=threads, expect=self.usage
        )
        engine.source = source
        return engine, source


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By K. A sum of two outputs is the same in either order; only three show the order of arrival."""
    found = {}
    for top_k in (2, 3):
        directory = write_tiny(tmp_path_factory.mktemp("model"), dataclasses.replace(TINY, routing=Routing(top_k)))
        predictor = tmp_path_factory.mktemp("predictor")
        write_predictor(predictor, HFCheckpoint(directory), horizon=4)
        found[top_k] = Setting(directory, str(predictor))
    return found


def run(engine: Engine, rows, steps: int, early: bool = False) -> np.ndarray:
    """`early`: steps are entered before the host knows their tokens."""
    logits, state = engine.prefill(rows, steps)
    out = [logits]
    for _ in range(steps):
        tokens = out[-1].argmax(-1).astype(np.int32)
        if early:
            engine.enter(tokens, state)
        out.append(engine.decode(tokens, state))
    return np.stack(out)


@settings(max_examples=25)
@given(
    top_k=st.sampled_from([2, 3]),
    predictor=st.sampled_from(PREDICTORS),
    share=st.sampled_from(["smallest", 0.25, 1.0]),
    lengths=st.one_of(
        st.lists(st.integers(1, 200), min_size=1, max_size=1), st.lists(st.integers(1, 60), min_size=3, max_size=3)
    ),
    mode=st.sampled_from(["thread", "inline", "disk"]),
    delays=st.one_of(st.none(), st.integers(0, 10**6)),
    seed=st.integers(0, 10**6),
    apart=st.booleans(),
    early=st.booleans(),
)
def test_bitwise_equal_to_the_resident_engine(
    models, top_k, predictor, share, lengths, mode, delays, seed, apart, early
):
    tiny = models[top_k]
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, TINY.vocab_size, n).tolist() for n in lengths]
    total = tiny.a.num_moe_layers * tiny.a.num_experts * tiny.bank.expert_bytes
    budget = tiny.smallest if share == "smallest" else max(int(share * total), tiny.smallest)
    engine, source = tiny.offloaded(predictor, budget, mode, delays)
    tiny.call_apart(apart)
    expected = run(tiny.resident, rows, 6)
    try:
        assert expected.tobytes() == run(engine, rows, 6, early).tobytes()
        assert source.store.peak_bytes <= source.store.budget_bytes
        if mode == "disk":
            # Memory that is about to come back may be replaced, no more: of what three threads and the decode thread
            # let go of at this moment, and of what a computation that has just ended still holds.
            assert source.bank.buffers.count <= source.store.capacity + 4 + top_k
    finally:
        source.close()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("top_k", [2, 3])
def test_every_predictor_and_budget_once(models, top_k, apart):
    """What hypothesis may not draw in one run: the whole table, at the timing of this machine."""
    tiny = models[top_k]
    tiny.call_apart(apart)
    for lengths in ([40], [3, 1, 17]):
        rng = np.random.default_rng(0)
        rows = [rng.integers(3, TINY.vocab_size, n).tolist() for n in lengths]
        expected = run(tiny.resident, rows, 6)
        for predictor in PREDICTORS:
            for experts in (top_k, 9, 35):
                engine, source = tiny.offloaded(predictor, experts * tiny.bank.expert_bytes, "disk", None)
                assert expected.tobytes() == run(engine, rows, 6).tobytes(), (lengths, predictor, experts)
                source.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("options", [{"upcast": "arrival"}, {"host_budget": "30%"}, {"budget_scope": "layer"}])
def test_options_of_offload_change_no_bit(models, tier, options):
    """Through the configuration: the same options with everything resident give the same logits."""
    if "host_budget" in options and tier == "host":
        return
    logits, rows = [], [[5, 6, 7, 8, 9], [10, 11]]
    resident = {"upcast": options["upcast"]} if "upcast" in options else {}
    for offload in ({"tier": "none", **resident}, {"tier": tier, "device_budget": "30%", **options}):
        model = moe_jax.load(str(models[2].converted.directory), offload=offload, prefetch={"predictor": "router"})
        logits.append(run(model.engine, rows, 12))
        source = model.engine.source
        if isinstance(source, OffloadedExperts):
            assert source.store.peak_bytes <= 0.3 * 35 * source.bank.expert_bytes
        model.close()
    assert logits[0].tobytes() == logits[1].tobytes()


def test_the_resident_reference_never_imports_offload(tmp_path):
    directory = write_tiny(tmp_path / "model")
    code = (
        "import sys, moe_jax\n"
        f"model = moe_jax.load({str(directory)!r}, offload={{'tier': 'none'}}, prefetch={{'predictor': 'none'}})\n"
        "assert ''.join(model.generate('abc', 3)) is not None\n"
        "assert not [name for name in sys.modules if name.startswith('moe_jax.offload')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

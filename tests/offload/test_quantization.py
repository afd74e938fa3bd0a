"""Quantised experts from the bank to the logits: fewer bytes over the link, the same bits wherever they live."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.converted import Converted, open_checkpoint
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.checkpoint.quantize import dequantize
from moe_jax.errors import UserError
from moe_jax.evaluation.agreement import compare
from moe_jax.inference import session
from moe_jax.inference.engine import Engine
from moe_jax.inference.memory import Reserve
from moe_jax.inference.resident import ResidentExperts
from moe_jax.inference.session import shipped
from moe_jax.inference.text import Tokenizer
from moe_jax.model.decoder import Stages, device_weights
from moe_jax.offload.bank import HostBank
from moe_jax.offload.disk import DiskBank
from moe_jax.offload.source import OffloadedExperts
from tests.tiny import TINY, write_tiny

ROOT = Path(__file__).parents[2]
FORMS = ("none", "packed", "int8", "int4")
IDS = [3 + x % 250 for x in range(0, 600, 7)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> dict[str, Converted]:
    return {form: convert(HFCheckpoint(source), tmp_path_factory.mktemp(form), form) for form in FORMS}


STAGES = Stages(TINY, jnp.float32)  # shared, so that each is compiled once


def logits(checkpoint, source) -> list[np.ndarray]:
    """After a prompt, and after five greedy tokens."""
    engine = Engine(STAGES, device_weights(checkpoint.dense(), jnp.float32), source)
    out, state = engine.prefill([IDS[:40]], 6)
    found = [np.asarray(out)]
    for _ in range(5):
        found.append(np.asarray(engine.decode(found[-1].argmax(-1).astype(np.int32), state)))
    source.close()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_offloaded_is_resident_to_the_bit(converted, form):
    checkpoint = converted[form]
    a = checkpoint.architecture
    resident = logits(checkpoint, ResidentExperts(checkpoint))
    for kind in (HostBank, DiskBank):
        for experts in (a.top_k, 9):
            bank = kind(checkpoint)
            offloaded = OffloadedExperts(bank, a, experts * bank.expert_bytes)
            np.testing.assert_array_equal(logits(checkpoint, offloaded), resident)


def test_converted_is_the_source_to_the_bit(source, converted):
    original = HFCheckpoint(source)
    want = logits(original, ResidentExperts(original))
    np.testing.assert_array_equal(logits(converted["none"], ResidentExperts(converted["none"])), want)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_experts_are_those_of_dequantised_weights(converted, form):
    """The product with few bits is the product with what they stand for."""
    quantised = converted[form]

    class Plain:
        architecture, dense = quantised.architecture, quantised.dense

        def expert(self, layer, expert):
            w, f = quantised.expert(layer, expert), quantised.architecture.experts.ff
            return w._replace(gate_up=dequantize(w.gate_up), down=dequantize(w.down)[:, :f])

    plain: Any = Plain()
    got, want = (logits(c, ResidentExperts(c)) for c in (quantised, plain))
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=1e-5 * scale)


def test_bytes_over_the_link(converted):
    """They shrink with the format, in the books of the store and in the arrays that are copied."""
    moved = {}
    for form, checkpoint in converted.items():
        bank = HostBank(checkpoint)
        arrays = jax.tree.leaves(bank.copy((0, 0)))
        assert sum(array.nbytes for array in arrays) == bank.expert_bytes == checkpoint.expert_bytes
        source = OffloadedExperts(bank, checkpoint.architecture, 4 * bank.expert_bytes)
        logits(checkpoint, source)
        loads = source.trace.loads
        moved[form] = sum(load.bytes for load in loads) / len(loads)
    assert moved["int8"] < 0.65 * moved["none"] and moved["int4"] < 0.4 * moved["none"]  # tiny: scales weigh more


def test_a_damaged_block_is_found_while_the_bank_is_loaded(source, tmp_path):
    convert(HFCheckpoint(source), tmp_path / "out", "int8")
    location = Converted(tmp_path / "out").expert_location(2, 1)
    data = bytearray(location.file.read_bytes())
    data[location.start + 7] ^= 1
    location.file.write_bytes(data)
    with pytest.raises(UserError, match=r"layers\.2\.experts\.1 does not have the checksum"):
        HostBank(open_checkpoint(tmp_path / "out"))


def test_agreement_of_a_model_with_itself_and_with_others(source, converted):
    original = HFCheckpoint(source)
    same = compare(original, converted["none"], IDS, context=32)
    assert same.kl == 0 and same.same_choice == 1 and same.perplexity == same.perplexity_reference
    assert same.tokens == len(IDS) // 32 * 31
    int8, int4 = (compare(original, converted[form], IDS, context=32) for form in ("int8", "int4"))
    assert 0 < int8.kl < 0.1 * int4.kl
    with pytest.raises(UserError, match="tokens; give at least 256"):
        compare(original, original, IDS[:5])


def test_agreement_is_that_of_the_engine(source, converted):
    """Teacher forcing in windows, against prefill of every prefix."""
    original, other = HFCheckpoint(source), converted["int4"]
    engines = [Engine(STAGES, device_weights(c.dense(), jnp.float32), ResidentExperts(c)) for c in (original, other)]
    ids, total, nats = IDS[:8], 0.0, 0.0
    for length in range(1, len(ids)):
        log_p, log_q = (np.asarray(jax.nn.log_softmax(e.prefill([ids[:length]], 1)[0][0])) for e in engines)
        total += (np.exp(log_p) * (log_p - log_q)).sum()
        nats -= log_q[ids[length]]
    found = compare(original, other, ids, context=len(ids))
    assert found.kl == pytest.approx(total / (len(ids) - 1), rel=1e-3)
    assert found.perplexity == pytest.approx(np.exp(nats / (len(ids) - 1)), rel=1e-4)


def infer(directory) -> subprocess.CompletedProcess:
    flags = [f"--config.checkpoint={directory}", "--prompt=abc", "--max_new_tokens=4"]
    return subprocess.run(
        [sys.executable, "infer.py", *flags], capture_output=True, text=True, cwd=ROOT, timeout=300, check=True
    )


def test_infer_takes_either_and_says_once_how_to_convert(source, converted):
    original = infer(source)
    assert original.stdout.count("convert.py") == 1 and "convert.py" not in original.stderr
    assert f"--checkpoint={source}" in original.stdout
    for form in ("none", "int4"):
        done = infer(converted[form].directory)
        assert "convert.py" not in done.stderr + done.stdout
        assert done.stdout.count("abc") == 1 and "hit rate" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("form, limit", [("int8", 0.002), ("int4", 0.03)])
def test_cost_on_held_out_text(tmp_path, form, limit):
    """The shipped model on the shipped texts: KL to the model as it is, nats per token."""
    original = HFCheckpoint(shipped("model"))
    quantised = convert(original, tmp_path / form, form)
    texts = sorted(shipped("held_out").glob("held_out_*.txt"))
    assert len(texts) == 3
    for text in texts:
        ids = Tokenizer(original.directory).encode(text.read_text(encoding="utf-8"))[:2000]
        assert compare(original, quantised, ids).kl < limit


@pytest.mark.parametrize(
    ("form", "platform", "widens"),
    [("int4", "gpu", True), ("packed", "tpu", True), ("none", "gpu", False), ("int4", "cpu", False)],
)
def test_auto_leaves_room_to_widen_on_accelerators(converted, monkeypatch, form, platform, widens):
    asked = []
    with closing(moe_jax.load(checkpoint=str(converted[form].directory), prefetch={"predictor": "none"})) as model:
        monkeypatch.setattr(session, "reserve", lambda *args: asked.append(args) or Reserve(0, 0, 0))
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        model._auto_budget()
    assert [args[-1] for args in asked] == [widens]

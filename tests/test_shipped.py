"""The shipped model: as good as its card says, evenly routed, and the same model in `transformers`."""

import json

import numpy as np
import pytest
import torch
import transformers

import moe_jax
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.inference.session import shipped
from moe_jax.training.scores import score_text

PROMPTS = ("And the LORD said unto", "def read_file(path):\n", "The :mod:`json` module provides")


@pytest.fixture(scope="module")
def peer():
    return transformers.AutoModelForCausalLM.from_pretrained(shipped("model"), dtype=torch.float32).eval()


def test_everything_shipped_is_at_most_24_megabytes():
    files = [path for path in shipped("model").parent.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {f"held_out_{name}.txt" for name in ("code", "docs", "prose")}
    assert sum(path.stat().st_size for path in files) <= 24_000_000


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["code", "docs", "prose"])
def test_bits_per_byte_and_expert_use(domain):
    text = (shipped("held_out") / f"held_out_{domain}.txt").read_text(encoding="utf-8")
    score = score_text(HFCheckpoint(shipped("model")), text)
    assert score["ratio"] <= 0.7
    assert score["least_used_expert"] >= 0.25
    card = json.loads((shipped("model") / "scores.json").read_text())[domain]
    assert score["bits_per_byte"] == pytest.approx(card["bits_per_byte"], rel=1e-4)


@pytest.mark.parametrize("tier", ["none", "host"])
def test_greedy_text_equals_transformers(peer, tier):
    model = moe_jax.load(offload={"tier": tier})
    generation = model.start(PROMPTS, 100)
    for _ in generation:
        pass
    model.close()
    for prompt, output in zip(PROMPTS, generation.outputs, strict=True):
        ids = torch.tensor([output.prompt_token_ids])
        theirs = peer.generate(ids, max_new_tokens=100, do_sample=False)[0, ids.shape[1] :].tolist()
        assert output.prompt == prompt and output.token_ids == theirs


def test_logits_equal_transformers_to_rounding(peer):
    model = moe_jax.load(offload={"tier": "none"}, prefetch={"predictor": "none"})
    text = (shipped("held_out") / "held_out_docs.txt").read_text(encoding="utf-8")
    ids = model.tokenizer.encode(text)[:300]
    logits, state = model.engine.prefill([ids[:200]], 100)
    ours = [np.asarray(logits)[0]]
    ours += [np.asarray(model.engine.decode(np.array([token], np.int32), state))[0] for token in ids[200:]]
    with torch.no_grad():
        theirs = peer(torch.tensor([ids])).logits[0].numpy()[199:]
    np.testing.assert_allclose(np.stack(ours), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

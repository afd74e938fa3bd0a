"""What the trainer holds, exported, is the same model in `transformers` and in HFCheckpoint."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer

from moe_jax.checkpoint import export
from moe_jax.checkpoint.families import mixtral
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture
from moe_jax.training import corpus, lm


def architecture(tied: bool) -> Architecture:
    return mixtral.architecture(
        vocab_size=300,
        d_model=24,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        num_experts=5,
        top_k=2,
        expert_ff=20,
        max_seq_len=64,
        rope_theta=1234.0,
        norm_eps=1e-3,
        tie_embeddings=tied,
        bos_id=0,
        eos_ids=(1,),
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    tokenizer = corpus.train_tokenizer(["def f(x): return x\n"], vocab_size=300)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def exported(request, tmp_path, data_dir):
    """Directory, architecture, graph and float32 parameters that are exact in bfloat16."""
    a = architecture(request.param)
    graph, params = lm.init_params(a, seed=3, std=0.3)
    scale = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(x) * scale.normal(1.0, 0.2, x.shape), params)  # norms differ from 1
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    export.save(tmp_path / "model", a, params, data_dir)
    return tmp_path / "model", a, graph, params


def test_transformers_reads_the_same_model(exported):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    directory, a, graph, params = exported
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = np.random.default_rng(1).integers(0, a.vocab_size, (2, 40))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    ours, stats = lm.forward(a, graph, params, jax.numpy.asarray(tokens), capacity_factor=a.num_experts / a.top_k)
    assert float(stats["dropped"]) == 0
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (0, 1)


def test_reads_back_what_was_written(exported):
    directory, a, _, params = exported
    checkpoint = HFCheckpoint(directory)
    assert checkpoint.architecture == a
    assert checkpoint.dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, checkpoint.dense(), params["dense"])
    for layer, experts in enumerate(params["experts"]):
        for e in range(a.num_experts):
            gate_up, down, *_ = checkpoint.expert(layer, e)
            np.testing.assert_array_equal(gate_up, experts["gate_up"][e])
            np.testing.assert_array_equal(down, experts["down"][e])


def test_transformers_reads_the_same_tokenizer(exported, data_dir):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported[0])
    ours = Tokenizer.from_file(str(data_dir / "tokenizer.json"))
    for text in ("def f(x):\n    return 1", "", "naïve 文"):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_an_unfinished_export_is_not_taken_for_whole(exported, data_dir, monkeypatch):
    directory, a, _, params = exported
    monkeypatch.setattr(export.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        export.save(directory, a, params, data_dir)
    with pytest.raises(UserError, match="no config.json"):
        HFCheckpoint(directory)


def test_no_tokenizer(tmp_path):
    a = architecture(True)
    _, params = lm.init_params(a, seed=0)
    with pytest.raises(UserError, match="tokenizer.json not found"):
        export.save(tmp_path / "model", a, params, tmp_path)
    assert not (tmp_path / "model").exists()


def test_generation_settings_name_every_eos(tmp_path, data_dir):
    a = dataclasses.replace(architecture(True), eos_ids=(1, 2))
    _, params = lm.init_params(a, seed=0)
    export.save(tmp_path / "model", a, params, data_dir)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    assert HFCheckpoint(tmp_path / "model").architecture.eos_ids == (1, 2)

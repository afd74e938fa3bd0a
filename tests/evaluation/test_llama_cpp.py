"""The same weights in llama.cpp give the same text: the GGUF file is right, and so is our decoder."""

import numpy as np
import pytest

from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.errors import UserError
from moe_jax.evaluation.gguf_file import write_gguf
from moe_jax.evaluation.peers.llama_cpp import LlamaCpp
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.model.decoder import Stages, device_weights
from tests.tiny import write_tiny

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
PROMPT = np.random.default_rng(5).integers(3, 259, 40).tolist()
NEW = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def expected(source):
    checkpoint = HFCheckpoint(source)
    stages = Stages(checkpoint.architecture, np.dtype(np.float32))
    engine = Engine(stages, device_weights(checkpoint.dense(), stages.dtype), ResidentExperts(checkpoint))
    logits, state = engine.prefill([PROMPT], NEW)
    tokens = [int(np.argmax(logits[0]))]
    while len(tokens) < NEW:
        tokens.append(int(np.argmax(engine.decode(np.array(tokens[-1:], np.int32), state)[0])))
    return tokens


@pytest.mark.parametrize("loading", ["mmap", "mmap_random", "read"])
def test_greedy_text_is_ours(source, expected, tmp_path, loading):
    run = LlamaCpp(write_gguf(source, tmp_path / "f.gguf"), 128, loading, threads=1).generate(PROMPT, NEW)
    assert run.token_ids == expected
    assert run.tpot_s > 0 and run.ttft_s > 0


def test_bfloat16_halves_the_file(source, tmp_path):
    small = write_gguf(source, tmp_path / "b.gguf", "bfloat16").stat().st_size
    assert small < 0.6 * write_gguf(source, tmp_path / "f.gguf").stat().st_size


def test_other_architectures_are_refused(tmp_path):
    import dataclasses

    from tests.tiny import TINY

    odd = dataclasses.replace(TINY, layers=tuple(dataclasses.replace(kind, window=8) for kind in TINY.layers))
    with pytest.raises(UserError, match="no Mixtral"):
        write_gguf(write_tiny(tmp_path / "odd", odd), tmp_path / "f.gguf")

"""An inflated copy: the same text from experts of any size, no block like another, nothing half written."""

import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoint.converted import Converted
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.errors import UserError
from moe_jax.evaluation.inflate import inflated
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.model.decoder import Stages, device_weights
from tests.tiny import TINY, write_tiny

WIDTH = 88


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def copies(source, tmp_path_factory):
    told = []
    paths = inflated(source, WIDTH, tmp_path_factory.mktemp("inflated"), lambda *progress: told.append(progress))
    shares = [done / total for done, total in told]
    assert shares == sorted(shares) and shares[-1] == 1 and 0 < shares[0] < 0.5 < shares[-2] < 1  # of both copies
    return paths


def logits_after(checkpoint, tokens, steps=12):
    """Float32 logits [steps, V] while decoding the tokens that follow."""
    stages = Stages(checkpoint.architecture, np.dtype(np.float32))
    dense = device_weights(checkpoint.dense(), stages.dtype)
    engine = Engine(stages, dense, ResidentExperts(checkpoint))
    logits, state = engine.prefill([tokens[:-steps]], steps)
    found = [np.asarray(logits[0])]
    for token in tokens[-steps:]:
        found.append(np.asarray(engine.decode(np.array([token], np.int32), state)[0]))
    return np.stack(found)


def test_the_text_is_the_originals(source, copies):
    tokens = np.random.default_rng(3).integers(3, 259, 60).tolist()
    original = logits_after(HFCheckpoint(source), tokens)
    for copy in (HFCheckpoint(copies[0]), Converted(copies[1])):
        np.testing.assert_allclose(logits_after(copy, tokens), original, atol=2e-4 * np.abs(original).max())


def test_experts_are_large_random_and_distinct(source, copies):
    original, copy, bank = HFCheckpoint(source), HFCheckpoint(copies[0]), Converted(copies[1])
    ff, blocks = TINY.experts.ff, set()
    assert copy.expert_bytes == bank.expert_bytes == 3 * WIDTH * TINY.d_model * 2
    for layer in range(TINY.num_moe_layers):
        for e in range(TINY.num_experts):
            had, has = original.expert(layer, e), copy.expert(layer, e)
            gate, up = np.split(has.gate_up, 2)
            assert has.gate_up.dtype == has.down.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(np.concatenate([gate[:ff], up[:ff]]), had.gate_up)
            np.testing.assert_array_equal(has.down[:, :ff], had.down)
            for part, real in ((gate[ff:], had.gate_up), (up[ff:], had.gate_up), (has.down[:, ff:].T, had.down)):
                spread = np.asarray(part, np.float32).std() / np.asarray(real, np.float32).std()
                assert 0.9 < spread < 1.1
                assert (np.asarray(part, np.float32) == 0).mean() < 0.01
                blocks |= {np.ascontiguousarray(pair).tobytes() for pair in part[::2]}  # one row of each pair
            for read, want in zip(bank.expert(layer, e), has, strict=True):
                assert (read is None) == (want is None)
                if want is not None:
                    np.testing.assert_array_equal(read, want)
    assert len(blocks) == TINY.num_moe_layers * TINY.num_experts * 3 * (WIDTH - ff) // 2


def test_an_interrupted_copy_is_made_again(source, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inflated(source, 40, tmp_path, interrupt)
    released, bank = inflated(source, 40, tmp_path)
    assert HFCheckpoint(released).architecture == Converted(bank).architecture
    written = (released / "config.json").stat().st_mtime_ns
    assert inflated(source, 40, tmp_path) == (released, bank)  # and a whole one is kept
    assert (released / "config.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("width", [25, 22])
def test_widths_that_do_not_fit(source, tmp_path, width):
    with pytest.raises(UserError, match="24 plus an even number"):
        inflated(source, width, tmp_path)

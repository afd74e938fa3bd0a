"""How many executables a process compiles, whatever it is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.model.decoder import Stages, device_weights
from tests.inference.test_engine import prompts
from tests.tiny import SIZES, mixtral, write_tiny

MOST = 40
compiled: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def listening():
    listen = lambda event, duration_secs, **_: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_thousand_random_routings_compile_few_executables(tmp_path):
    checkpoint = HFCheckpoint(write_tiny(tmp_path / "model", mixtral.architecture(**{**SIZES, "max_seq_len": 600})))
    stages = Stages(checkpoint.architecture, jnp.float32)
    engine = Engine(stages, device_weights(checkpoint.dense(), jnp.float32), ResidentExperts(checkpoint, jnp.float32))
    rng = np.random.default_rng(0)
    jax.clear_caches()
    compiled.clear()
    routings = 0
    lengths = iter([1, 2, 31, 32, 33, 255, 256, 257, 499, 500])
    while routings < 1000:
        batch = int(rng.integers(1, 9))
        rows = prompts([next(lengths, int(rng.integers(1, 501))) for _ in range(batch)], seed=routings)
        logits, state = engine.prefill(rows, 12)
        for _ in range(10):
            state.active = np.arange(len(state.lengths)) < rng.integers(1, batch + 1)  # others have ended
            logits = engine.decode(np.asarray(logits).argmax(-1).astype(np.int32), state)
            routings += checkpoint.architecture.num_moe_layers
    count = compiled.count("/jax/core/compile/backend_compile_duration")
    assert 10 < count <= MOST, count

"""What "auto" leaves for experts. That the estimates hold is for tests/aot to say."""

import math
import threading
from contextlib import closing

import jax.numpy as jnp
import pytest

import moe_jax
from moe_jax.errors import UserError
from moe_jax.inference.memory import auto_budget, reserve
from moe_jax.model.decoder import Stages
from tests.tiny import TINY


def test_reserves_what_the_largest_request_takes():
    r = reserve(TINY, batch=3, positions=128, prefill_chunk=16, itemsize=2)
    assert r.cache == sum(x.nbytes for pair in Stages(TINY, jnp.bfloat16).kv_cache(3, 128) for x in pair)
    assert r.activations == 3 * 128 * (4 + 2) * 32 * 2
    assert r.temporaries > 16 * 4 * 128 * (4 + 4)  # the scores of 16 rows and 4 heads


def test_experts_that_are_widened_whole_take_room():
    plain, widening = (reserve(TINY, 1, 1, 1, 4, widens) for widens in (False, True))
    matrix = max(math.prod(shape) for shape in TINY.expert_shapes().values())
    assert widening.temporaries >= 2 * matrix * 4 > plain.temporaries and widening[:2] == plain[:2]
    # Compared with a long context they do not matter: no two executables run at once.
    assert reserve(TINY, 8, 4096, 16, 4, True) == reserve(TINY, 8, 4096, 16, 4, False)


def test_auto_is_what_is_left():
    r = reserve(TINY, 1, 256, 16, 4)
    assert auto_budget(10**9, 10**8, r) == 95 * 10**7 - 10**8 - sum(r)


def test_auto_says_what_takes_all():
    r = reserve(TINY, 1, 256, 16, 4)
    with pytest.raises(
        UserError, match=r"of 1.0 GB .* stay there 0.9 GB.*lower --config.max_seq_len or --config.batch_size"
    ) as e:
        auto_budget(10**9, 949_999_999, r)
    assert "\n" not in str(e.value)


def test_a_model_runs_with_auto():
    with closing(moe_jax.load(offload={"device_budget": "auto"}, prefetch={"predictor": "none"})) as model:
        assert model.engine.source.store.budget_bytes == model.engine.source.bank.total_bytes  # pyright: ignore
    with pytest.raises(UserError, match="leaves nothing for experts"):
        moe_jax.load(offload={"device_budget": "auto"}, prefetch={"predictor": "none"}, batch_size=10**9)


def test_a_model_that_cannot_be_made_leaves_nothing_running():
    threads = lambda: [thread for thread in threading.enumerate() if thread.name.startswith("moe_jax")]
    before = threads()
    with pytest.raises(UserError, match="recall"):
        moe_jax.load(execution="hybrid", prefetch={"predictor": "frequency"})
    assert threads() == before

"""What a jitted stage owes to its platform, read from what it is lowered to: no accelerator is needed."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.inference.calls import ExpertCalls
from moe_jax.model.decoder import Stages
from moe_jax.model.platforms import jitted, reproducible
from tests.tiny import TINY


def product(x, y):
    return x @ y


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_float32_is_multiplied_as_float32_where_it_would_not_be(platform):
    lowered = lambda platform, dtype: jitted(product, platform, dtype).lower(*[jnp.ones((2, 2), dtype)] * 2).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in lowered(platform, jnp.float32)
    assert "HIGHEST" not in lowered(platform, jnp.bfloat16)
    assert "HIGHEST" not in lowered("cpu", jnp.float32)


def test_options_of_the_jit_are_kept():
    x = jnp.ones((2, 2))
    jitted(product, "gpu", jnp.float32, donate_argnums=0)(x, jnp.ones((2, 2)))
    assert x.is_deleted()


def test_experts_share_a_call_where_a_call_is_dear(monkeypatch):
    monkeypatch.setattr("moe_jax.inference.calls.LARGE_EXPERT", 0)
    calls = {platform: ExpertCalls(Stages(TINY, jnp.bfloat16, platform)) for platform in ("cpu", "gpu", "tpu")}
    assert {platform: c.together for platform, c in calls.items()} == {"cpu": 1, "gpu": TINY.top_k, "tpu": TINY.top_k}
    assert [platform for platform, c in calls.items() if c.can_be_ahead(1)] == ["cpu"]


def test_a_gpu_takes_no_kernel_that_was_the_fastest_by_chance(monkeypatch):
    given = {}
    monkeypatch.setattr(jax, "jit", lambda function, **options: given.update(options) or function)
    jitted(product, "gpu", jnp.bfloat16)
    assert given["compiler_options"] == {"xla_gpu_autotune_level": 0}
    jitted(product, "tpu", jnp.bfloat16)
    assert given["compiler_options"] is None


def test_fits_add_up_in_one_order_and_in_float32(monkeypatch):
    lowered, compiled = [], jax.jit

    def watched(function, compiler_options, **options):
        lowered.append((compiler_options, compiled(function, **options)))
        return lowered[-1][1]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    scaled = reproducible(static_argnames="times")(lambda x, y, times=1: product(x, y) * times)
    monkeypatch.setattr(jax, "jit", watched)
    ones = jnp.ones((2, 2))
    assert (scaled(ones, ones, times=3) == 6).all() and (scaled(ones, ones) == 2).all()
    [(options, function)] = lowered  # compiled for the platform of the first call, and once
    assert options["xla_gpu_deterministic_ops"] and "HIGHEST" in function.lower(ones, ones).as_text()

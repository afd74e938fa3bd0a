"""The limit of the pinned pool: how large, and that it is set before a backend reads it."""

import os
import subprocess
import sys

import jax
import pytest

from moe_jax.offload import pinned
from moe_jax.offload.pinned import VARIABLE, pool_gib, provide

GIB = 2**30


@pytest.fixture
def fresh(monkeypatch):
    """A process that has started no backend, and an environment without the variable."""
    monkeypatch.setattr(pinned.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(VARIABLE)


@pytest.mark.parametrize("bank, pool", [(0, 4), (1, 5), (16 * GIB, 21), (16 * GIB + 1, 22), (56 * GIB, 64)])
def test_the_pool_holds_the_bank_and_a_little_more(bank, pool):
    assert pool_gib(bank) == pool


def test_a_small_bank_changes_nothing(fresh):
    assert provide(56 * GIB) == "" and VARIABLE not in os.environ


def test_a_large_bank_raises_the_limit(fresh):
    assert provide(90_194_313_216) == ""  # Mixtral-8x7B in bfloat16
    assert os.environ[VARIABLE] == "94"


def test_the_users_own_limit_stays(fresh, monkeypatch):
    monkeypatch.setenv(VARIABLE, "200")
    assert provide(90 * GIB) == ""
    monkeypatch.setenv(VARIABLE, "80")
    assert provide(90 * GIB).endswith("limited to 80; set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=100 before Python starts")
    assert os.environ[VARIABLE] == "80"


def test_too_late(fresh, monkeypatch):
    monkeypatch.setattr(pinned.xla_bridge, "backends_are_initialized", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "limited to 64; set" in provide(90 * GIB) and VARIABLE not in os.environ
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")  # which has no such pool
    assert provide(90 * GIB) == ""


SCRIPT = f"""
import os
import moe_jax
from jax._src import xla_bridge
from moe_jax.offload import pinned

pinned.DEFAULT_GIB = 0  # the shipped model's bank is small
start = xla_bridge._init_backend

def init_backend(platform):
    print(platform, os.environ.get("{VARIABLE}"))
    return start(platform)

xla_bridge._init_backend = init_backend
moe_jax.load(offload={{"tier": TIER}}).close()
"""


@pytest.mark.parametrize("tier, limit", [("host", "5"), ("none", "None")])
def test_is_set_before_a_backend_starts(tier, limit):
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"JAX_PLATFORMS": "cpu"}
    script = SCRIPT.replace("TIER", repr(tier))
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout == f"cpu {limit}\n", result.stderr

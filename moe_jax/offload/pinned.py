"""The pool of pinned host memory of a GPU. Its limit is read from the environment once, when jax starts the backend."""

from __future__ import annotations

import os

import jax
from jax._src import xla_bridge  # nothing public tells whether a backend has started without starting it

VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
DEFAULT_GIB = 64  # openxla/xla, xla/pjrt/gpu/gpu_helpers.cc, GetGpuHostAllocator; the pool grows as it is used
STAGING_GIB = 4  # for what else passes through the pool: dense weights, one expert on its way into the bank


def pool_gib(bank_bytes: int) -> int:
    """GiB of a pool that holds a bank: a sixteenth more, as an array never spans two of the regions it grows by."""
    return -(-(bank_bytes + bank_bytes // 16) // 2**30) + STAGING_GIB


def provide(bank_bytes: int) -> str:
    """Raises the limit of the pool if a bank of this size needs it. To be called before anything starts a backend.

    Returns:
      What the user should know, one line: it is too late, or the environment has a smaller limit. Empty: all is well.
    """
    needed = pool_gib(bank_bytes)
    own = os.environ.get(VARIABLE, "")
    limit = int(own) if own.isdecimal() else DEFAULT_GIB
    if needed <= limit:
        return ""
    started = xla_bridge.backends_are_initialized()
    if not started and not own:
        os.environ[VARIABLE] = str(needed)
        return ""
    if started and jax.default_backend() != "gpu":
        return ""
    return (
        f"pinned memory: the experts need a pool of {needed} GiB, and it is limited to {limit};"
        f" set {VARIABLE}={needed} before Python starts"
    )

"""A few rows times a packed matrix on a CPU: weights are widened in registers, at the speed at which they come.

XLA's CPU backend has no form for this that does not write the widened matrix to memory, or run without vectors. So the
loop is given in LLVM's language (`packed_cpu.ll`), compiled once per process (0.1 s) by LLVM for the processor at hand,
and called from jitted functions through XLA's foreign function interface. No Python runs, and no lock is held.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp

from moe_jax.model.packed import Packed, padded

MOST_ROWS = 4
_LEAST_HALF = 16  # columns that are taken at once
_LARGE = 1 << 18  # weights
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# XLA (jaxlib 0.10) halves a queue of calls for another thread while more than 8 wait besides the one that it runs.
_PARTS = 5 * min(_CORES, 8) if _CORES > 1 else 1


def suits(x: jax.Array, w: Packed) -> bool:
    """Whether rows are few enough for this to be the faster way, and the matrix is wide enough."""
    # Also accelerators trace this: what they never run is not to be compiled for them.
    few = jax.default_backend() == "cpu" and 0 < len(x) <= MOST_ROWS
    return few and w.exponents.shape[1] >= _LEAST_HALF


def product(x: jax.Array, w: Packed) -> jax.Array:
    """`x [R, in]` times the matrix transposed, summed in float32, in x's dtype: `[R, out]`.

    One row goes at 8 weights per nanosecond, four at 3 to 4. Every output of every row is summed by itself, in the same
    order whatever the number of rows and threads.
    """
    with _COMPILING:
        _register()
    out, h = w.exponents.shape
    parts = min(out, _PARTS) if w.values.size >= _LARGE else 1
    rows = padded(x.astype(jnp.float32), h)

    def part(first: int, end: int) -> jax.Array:
        call = jax.ffi.ffi_call(_NAME, jax.ShapeDtypeStruct((len(x), end - first), jnp.float32))
        return call(rows, *w, jnp.array([first], jnp.int32))

    bounds = [out * p // parts for p in range(parts + 1)]
    return jnp.concatenate([part(*pair) for pair in itertools.pairwise(bounds)], axis=1).astype(x.dtype)


_NAME = "moe_jax_packed_product"
_COMPILING = threading.Lock()


@functools.cache
def _register() -> object:
    """Compiles the loop and names it to XLA; the compiler's engine, which owns the code, stays referenced."""
    import llvmlite.binding as llvm  # only who runs packed experts waits for it

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    module = llvm.parse_assembly(Path(__file__).with_suffix(".ll").read_text())
    module.triple, module.data_layout = target.triple, str(target.target_data)
    module.verify()
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    jax.ffi.register_ffi_target(_NAME, jax.ffi.pycapsule(engine.get_function_address("packed_product")), platform="cpu")
    return engine

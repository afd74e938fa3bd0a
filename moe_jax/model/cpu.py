"""A few rows times a stored matrix on a CPU, and one token's attention, at the speed at which memory gives the data.

XLA's CPU backend (jaxlib 0.10) gives each thread an equal part of a product, and all wait for the one that woke last:
half of the time, with matrices of a few megabytes. For int8 with several rows, and for packed matrices, it has no form
that does not first write the widened matrix to memory. So the loops are given in LLVM's language (`cpu_*.ll`), compiled
once per process by LLVM for the processor at hand (0.2 s), and called from jitted functions through XLA's foreign
function interface; nothing differentiates them. XLA's own threads take blocks of outputs as they come. No Python runs,
and no lock is held. Every output of every row is summed by itself, in the same order whatever the number of rows,
threads and blocks. A token's attention (`attend`) is shared by key head.

Weights per nanosecond, 2 cores, matrices of 2304 x 576 / 14336 x 2048 that come from memory on huge pages:

| rows | float32, XLA | here      | bfloat16, XLA | here       | int8, XLA | here       |
|------|--------------|-----------|---------------|------------|-----------|------------|
| 1    | 3.6 / 7.6    | 5.4 / 6.5 | 6.4 / 8.7     | 9.0 / 11.3 | 6.8 / 9.6 | 14 / 17    |
| 4    | 3.0 / 4.4    | 4.2 / 4.4 | 4.0 / 9.0     | 7.3 / 7.4  | 2.7 / 1.5 | 10 / 11    |
| 8    | 2.6 / 4.0    | 3.2 / 3.2 | 3.5 / 8.3     | 5.3 / 4.0  | 2.4 / 1.4 | 6.0 / 5.4  |

Microseconds of a layer's attention for one token, 16 heads on 8 key heads of 64, calls included: at 30, 1,500 and 8,000
positions 50, 1,490 and 7,200 in blocks by XLA, which copies each, and 20, 400 and 1,740 here.
"""

from __future__ import annotations

import functools
import string
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

_PLAIN = {
    jnp.dtype(jnp.float32): ("float32", "float", "%wide = bitcast <16 x float> %stored to <16 x float>"),
    jnp.dtype(jnp.bfloat16): (
        "bfloat16",
        "i16",
        "%bits = zext <16 x i16> %stored to <16 x i32>\n  %high = shl <16 x i32> %bits, splat (i32 16)\n"
        "  %wide = bitcast <16 x i32> %high to <16 x float>",
    ),
    jnp.dtype(jnp.int8): ("int8", "i8", "%wide = sitofp <16 x i8> %stored to <16 x float>"),
}
"""By dtype of weights: its name, LLVM's type, and how 16 of them are widened to float32."""
_MOST_ROWS = {"float32": 4, "bfloat16": 4, "int8": 16, "packed": 4}
"""Beyond which XLA has something faster for most matrices."""
_BLOCK_BYTES = 1 << 17
_AHEAD = 1 << 11  # weights from the one that is read to the one that the processor is asked for
_TURNS = 300  # that a thread which has nothing to do looks for more, some 0.1 ms in all
_COMPILING = threading.Lock()


def suits(x: jax.Array, *weights: jax.Array) -> bool:
    """Whether to use `product`: it knows the dtype, rows are few, and a packed matrix is wide enough."""
    # Also accelerators trace this: what they never run is not to be compiled for them.
    if jax.default_backend() != "cpu" or (len(weights) == 1 and weights[0].dtype not in _PLAIN):
        return False
    narrow = len(weights) > 1 and weights[1].shape[1] < 16
    return 0 < len(x) <= _MOST_ROWS[_name(weights)] and x.shape[1] > 0 and not narrow


def product(x: jax.Array, *weights: jax.Array) -> jax.Array:
    """`x [R, width]` times a matrix transposed, summed in float32, in x's dtype: `[R, outputs]`.

    Args:
      weights: `[outputs, width]` of float32, bfloat16 or int8, or the parts of a `Packed`, of which a half has at least
        16 columns.
    """
    call = _call(f"{_name(weights)}_product", (len(x), len(weights[0])))
    return call(x.astype(jnp.float32), *weights).astype(x.dtype)


def attends(q: jax.Array, v: jax.Array) -> bool:
    """Whether to use `attend`, for q [B, T, N, H] and v [B, G, S, Hv]: it knows dtype and widths, threads can share."""
    floats, wide = q.dtype == v.dtype == jnp.float32, q.shape[3] % 16 == 0 and v.shape[3] % 16 == 0
    return jax.default_backend() == "cpu" and floats and wide and v.shape[1] > 1


def attend(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, end: jax.Array, start: jax.Array) -> jax.Array:
    """One token of each row attends over its cache, of which nothing else is read.

    Args:
      q: float32 [B, G, M, H], scaled: of the M query heads of each key head.
      k: float32 [B, G, S, H]; v: float32 [B, G, S, Hv].
      first, end: int32 [B], of each row's slots; where there are none the result is 0.
      start: float32 [2, G, M], a score and its weight in the softmax that add nothing to the result.

    Returns:
      float32 [B, G, M, Hv].
    """
    slots = jnp.stack([first, end], axis=1).astype(jnp.int32)
    return _call("attend", (*q.shape[:3], v.shape[3]))(q, k, v, slots, start)


def _call(name: str, shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    """A function of cpu_*.ll that gives float32 of this shape."""
    with _COMPILING:
        _register(_BLOCK_BYTES)
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(_target(name, _BLOCK_BYTES), result, vmap_method="sequential")


def _name(weights: tuple[jax.Array, ...]) -> str:
    return _PLAIN[weights[0].dtype][0] if len(weights) == 1 else "packed"


def _target(name: str, block_bytes: int) -> str:
    return f"moe_jax_{name}_{block_bytes}"


@functools.cache
def _register(block_bytes: int) -> object:
    """Compiles the loops and names them to XLA; the compiler's engine, which owns the code, stays referenced."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    module = llvm.parse_assembly(_text(block_bytes))
    module.triple, module.data_layout = target.triple, str(target.target_data)
    module.verify()
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    for name in (*(f"{name}_product" for name, *_ in _PLAIN.values()), "packed_product", "attend"):
        address = engine.get_function_address(name)
        jax.ffi.register_ffi_target(_target(name, block_bytes), jax.ffi.pycapsule(address), platform="cpu")
    return engine


def _text(block_bytes: int) -> str:
    """The loops in LLVM's language."""
    shared, plain, packed, attention = (
        string.Template(Path(__file__).with_name(f"cpu_{part}.ll").read_text())
        for part in ("shared", "plain", "packed", "attention")
    )
    parts = [shared.substitute(turns=_TURNS), *(part.substitute(block=block_bytes) for part in (packed, attention))]
    for dtype, (name, type_, widen) in _PLAIN.items():
        ahead = (_AHEAD * dtype.itemsize + 64 * line for line in range(dtype.itemsize))  # 64 columns
        prefetch = "\n  ".join(
            f"%ahead_{at} = getelementptr i8, ptr %here, i64 {at}\n"
            f"  call void @llvm.prefetch.p0(ptr %ahead_{at}, i32 0, i32 3, i32 1)"
            for at in ahead
        )
        block = block_bytes // dtype.itemsize
        parts.append(plain.substitute(name=name, type=type_, widen=widen, prefetch=prefetch, block=block))
    return "\n".join(parts)

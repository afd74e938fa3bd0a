"""What must hold of an executable, read from what XLA made of it. Each check gives faults in words; none: it holds."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

HOST = {
    "computation on the host": r'"HostExecute"|_xla_compute_type="host"|async_execution_thread="host',
    "a call of Python": r'custom_call_target="[^"]*callback[^"]*"',
    "a transfer to or from the host": r"is_host_transfer=true|\b(?:infeed|outfeed)\(",
    "placement left to whoever runs it": r"annotate_device_placement",
}
_IN_HOST_MEMORY = re.compile(r"(\w+)\[([\d,]*)\]\{[^{}]*S\(5\)\}")
_TOLD = re.compile(r"s32 \d+,\d+")
_TOLD_BYTES = 8192  # of a chunk of 256 tokens, 8 experts each
# What gives an array without making one.
_FREE = {"parameter", "bitcast", "get-tuple-element", "tuple", "constant"}
# `%name = bf16[4096,14336]{1,0:T(8,128)(2,1)S(1)} operation(...)`
_RESULT = re.compile(r"^\s*(?:ROOT )?%\S+ = (\w+)\[([\d,]+)\](\{[^}]*\})? ([\w-]+)\(", re.MULTILINE)
_NAMES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "int32": "s32", "int8": "s8", "uint8": "u8"}


class Executable(NamedTuple):
    """See `tests/aot/compile.py`, whose `Compiled` this is."""

    model: str
    phase: str
    stage: str
    batch: int
    arguments: list
    arity: int
    bucket: int
    temporary_bytes: int
    new_output_bytes: int
    host_bytes: int
    hlo: str

    def __str__(self) -> str:
        what = f" of {self.arity} experts on {self.bucket} rows" if self.arity else ""
        return f"{self.model}, {self.phase}, {self.stage}{what}, batch {self.batch}"


def copies_of_weights(executable: Executable, expert_bytes: int, weights: dict[tuple[int, ...], str]) -> list[str]:
    """An upcast, transposition or other copy of an expert's matrices: too much memory, or an array of their size.

    A TPU may read a matrix into its own fast memory ahead, S(1), in the same dtype: that is no copy in device memory.

    Args:
      weights: dtype of an expert's matrices, by shape.
    """
    found = []
    if executable.temporary_bytes >= expert_bytes:
        found.append(f"{executable}: {executable.temporary_bytes} temporary bytes, an expert has {expert_bytes}")
    entry = executable.hlo[executable.hlo.index("\nENTRY ") :]
    for dtype, dims, layout, operation in _RESULT.findall(entry):
        shape = tuple(map(int, dims.split(",")))
        kept = next((_NAMES[kept] for matrix, kept in weights.items() if _holds(shape, matrix)), None)
        if kept is None or operation in _FREE or (dtype == kept and "S(1)" in layout):
            continue
        found.append(f"{executable}: {operation} makes {dtype}[{dims}], the size of an expert's matrix")
    return found


def _holds(shape: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
    """Whether an array may be a matrix with its dimensions split or swapped, or several of them."""
    groups = [c for n in range(1, len(shape) + 1) for c in itertools.combinations(range(len(shape)), n)]
    products = {group: math.prod(shape[i] for i in group) for group in groups}
    rows, columns = ([set(g) for g, product in products.items() if product == side] for side in matrix)
    return any(not one & other for one in rows for other in columns)


def host_compute(executable: Executable) -> list[str]:
    """Anything that happens on the host or in its memory, but for the router's choice, which the host is told."""
    found = [f"{executable}: {what}" for what, pattern in HOST.items() if re.search(pattern, executable.hlo)]
    kept = {f"{dtype} {dims}" for dtype, dims in _IN_HOST_MEMORY.findall(executable.hlo)}
    told = {what for what in kept if executable.stage == "route" and _TOLD.fullmatch(what)}
    found += [f"{executable}: {what} in host memory" for what in sorted(kept - told)]
    if executable.host_bytes > (_TOLD_BYTES if told else 0):
        found.append(f"{executable}: {executable.host_bytes} bytes in host memory")
    return found


def too_many(executables: Iterable[Executable], layer_kinds: int) -> list[str]:
    """More than one executable per kind of layer, or per arity and bucket of a call of experts."""
    groups: dict[tuple, int] = {}
    for e in executables:
        key = (e.model, e.batch, e.phase, e.stage, e.arity, e.bucket)
        groups[key] = groups.get(key, 0) + 1
    allowed = lambda stage: layer_kinds if stage in ("route", "dense_layer") else 1
    return [f"{key}: {n} executables" for key, n in groups.items() if n > allowed(key[3])]


def over_card(card_bytes: int, parts: dict[str, int]) -> list[str]:
    """What is on the device at once is more than it has."""
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return [] if total <= card_bytes else [f"{total / 1e9:.2f} of {card_bytes / 1e9:.2f} GB: {listed}"]


def largest_temporary(executables: Sequence[Executable]) -> int:
    """Bytes that the executable which needs most takes beside its arguments."""
    return max(e.temporary_bytes + e.new_output_bytes for e in executables)

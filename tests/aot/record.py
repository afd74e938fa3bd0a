"""An engine that computes nothing: shapes go in and out of its jitted functions, and every call is noted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint.quantize import quantized_spec
from moe_jax.inference.engine import Engine
from moe_jax.model.architecture import Architecture
from moe_jax.model.decoder import Stages
from moe_jax.model.experts import ExpertWeights
from moe_jax.model.layers import MODULES, abstract_dense
from moe_jax.model.quantized import Mxfp4

POSITIONS = 8192
"""Of the key/value cache: a long prompt and what is generated."""
PHASES = {"embed": "prefill", "begin": "decode"}
"""By the function that a phase begins with."""
QUANTISED = ("packed", "int8", "int4", "mxfp4")
_RNG = np.random.default_rng(0)


class Ready(jax.ShapeDtypeStruct):
    """The shape of a result, in the place of one."""

    def block_until_ready(self) -> Ready:
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.zeros(self.shape, dtype or self.dtype)


def _result(x: jax.ShapeDtypeStruct) -> Any:
    """In the place of a result: its shape. Of the router's choice (int32 [R, K]) K different experts a row."""
    if x.dtype != jnp.int32:
        return Ready(x.shape, x.dtype)
    return np.argsort(_RNG.random((x.shape[0], Recorder.experts)), axis=1)[:, : x.shape[1]].astype(np.int32)


class Recorder:
    """A jitted function that computes nothing: it notes with what shapes it is called, and returns shapes."""

    jit = staticmethod(jax.jit)
    calls: dict[Any, tuple[Recorder, str, Any]] = {}
    phase = ""
    experts = 0  # of a layer

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._function = self.jit(function, **options)
        while isinstance(function, functools.partial):
            function = function.func
        self.name = function.__name__

    def __call__(self, *args: Any) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), args)
        if self.name in PHASES:
            Recorder.phase = PHASES[self.name]
        leaves = tuple((x.shape, x.dtype.name) for x in jax.tree.leaves(shapes))
        self.calls.setdefault((id(self), jax.tree.structure(shapes), leaves), (self, self.phase, shapes))
        return jax.tree.map(_result, jax.eval_shape(self._function, *args))

    def trace(self, *shapes: Any) -> Any:
        return self._function.trace(*shapes)


def cache_of(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and positions of keys or values [B, G, S, H]; None: it is another array's shape."""
    return (shape[0], shape[2]) if len(shape) == 4 and shape[2] == POSITIONS else None


@contextlib.contextmanager
def recording() -> Iterator[dict[Any, tuple[Recorder, str, Any]]]:
    """Functions of ours that are jitted meanwhile are `Recorder`s; gives what they are called with."""

    def jit(function, **options):
        inner = function.func if isinstance(function, functools.partial) else function
        return (Recorder if inner.__module__.startswith("moe_jax") else Recorder.jit)(function, **options)

    Recorder.calls, jax.jit = {}, jit
    try:
        yield Recorder.calls
    finally:
        jax.jit = Recorder.jit


def abstract_experts(a: Architecture, form: str = "none") -> ExpertWeights:
    """One expert, in bfloat16 or in one of `QUANTISED`, without memory."""
    shapes: Any = {k: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for k, shape in a.expert_shapes().items()}
    expert = ExpertWeights(**shapes)
    if form != "mxfp4":
        return quantized_spec(expert, form)
    byte: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.uint8)
    mxfp4 = lambda x: Mxfp4(byte(x.shape[0], x.shape[1] // 32, 16), byte(x.shape[0], x.shape[1] // 32))
    return expert._replace(gate_up=mxfp4(expert.gate_up), down=mxfp4(expert.down))


class AbstractSource:
    """Every expert is there, and has no memory."""

    def __init__(self, expert: ExpertWeights):
        self._expert = expert

    def begin_token(self, token: int) -> None:
        pass

    def request(self, layer: int, experts: Sequence[int], by_token: np.ndarray | None = None) -> list[int]:
        return list(experts)

    def ready(self, layer: int, experts: Sequence[int]) -> bool:
        return True

    lends = False

    def borrow(self, layer: int, experts: Sequence[int] | None = None) -> None:
        return None

    def give_back(self, layer: int, needed: Sequence[int], after: Any) -> None:
        pass

    def take(self, layer: int, experts: Sequence[int]) -> tuple[ExpertWeights, ...]:
        return (self._expert,) * len(experts)

    def settle(self) -> None:
        pass

    def release(self, layer: int, experts: Sequence[int], after: Any) -> None:
        pass

    def offer(self, layer: int, probabilities: np.ndarray) -> None:
        pass

    def wants_prediction(self, cost_s: float) -> bool:
        return False

    def close(self) -> None:
        pass


class AbstractStages(Stages):
    """In bfloat16, with a cache without memory."""

    def __init__(self, a: Architecture, platform: str):
        super().__init__(a, jnp.bfloat16, platform)

    def kv_cache(self, batch: int, capacity: int) -> Any:
        a = self.architecture
        shapes = MODULES[type(a.attention)].cache_shapes(a.attention, batch, capacity)
        return [tuple(jax.ShapeDtypeStruct(shape, self.dtype) for shape in shapes) for _ in a.layers]


def abstract_engine(a: Architecture, platform: str = "") -> Engine:
    """To be made within `recording`; `platform` as for `Stages`."""
    Recorder.experts = a.num_experts
    dense = abstract_dense(a, jnp.bfloat16)
    return Engine(AbstractStages(a, platform), dense, AbstractSource(abstract_experts(a)), max_seq_len=POSITIONS)

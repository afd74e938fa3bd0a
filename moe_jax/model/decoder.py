"""Decoder stages: pure jitted functions over plain pytrees. They know nothing of where experts live.

One decode step is `begin`, then per layer either `dense_layer`, or `route` and `experts` (one or more calls), then
`head`. What experts gave is added up by whatever comes next: a call of its own would take longer than the sum. In a
prefill, which keeps many chunks, `embed` comes first, and `combine` after each layer's experts. The layer's weights are
arguments, so all layers of a kind share one executable per shape.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from moe_jax.memory import together
from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import run_chosen, run_experts, run_held
from moe_jax.model.layers import MODULES, Decoder
from moe_jax.model.platforms import for_host, jitted
from moe_jax.model.primitives import linear
from moe_jax.model.rope import rope_table

KVCache = list[tuple[jax.Array, ...]]
"""Per layer, what its attention caches: keys and values, each [B, G, S, H], or what `cache_shapes` says."""

CHUNKS = 8
"""Chunks of a prompt that are joined for the experts. Shorter prompts of several chunks are too: few executables."""


class Routed(NamedTuple):
    """What `route` knows of a layer, for R = B * T token rows."""

    residual: jax.Array  # [R, D], after attention and the shared expert (if any) are added
    h: jax.Array  # [R, D], normalised: what router and experts see
    logits: jax.Array  # [R, E] float32 router logits
    ids: jax.Array  # [R, K] int32, the first choice first
    gates: jax.Array  # [R, K] float32
    outputs: jax.Array  # [R * K, D] the slots that `experts` fills; zeros
    told: jax.Array  # `ids` where the host reads them soonest


class Stream(NamedTuple):
    """x of R = B tokens, of which what the latest experts gave has not been added up: see `_combined`."""

    residual: jax.Array  # [R, D]
    outputs: Any  # [R * K, D]
    gates: Any  # [R, K] float32


class Stages:
    """The jitted stages of one architecture in one compute dtype.

    Attributes:
      platform: on which they run.
      experts, chosen, held: `run_experts`, `run_chosen` and `run_held` (moe_jax.model.experts) with the model's
        activation. The output slots are donated.
      join: (h of CHUNKS chunks, [R, D] each) -> h [CHUNKS * R, D] and zeroed output slots for it.
      split: the output slots of joined chunks -> those of each chunk, [R * K, D].
      combine: (Routed.residual, outputs, gates, x for its shape) -> x [B, T, D].
    """

    def __init__(self, a: Architecture, dtype: Any, platform: str = ""):
        """`platform`: on which they will run, as jax names it; default: where jax runs."""
        self.architecture, self.dtype = a, dtype
        self.platform = platform = platform or jax.default_backend()
        jit = functools.partial(jitted, platform=platform, dtype=dtype)
        decoder = nnx.eval_shape(lambda: Decoder(a, dtype, rngs=nnx.Rngs(0)))
        norm_graph = nnx.graphdef(decoder.norm)

        def embed(embedding, tokens):
            return embedding[tokens]

        def begin(embedding, tokens, positions):
            return still(embedding[tokens], a.top_k), positions[:, None]

        def entering(x, positions):
            return _combined(*x).reshape(*positions.shape, -1) if isinstance(x, Stream) else x

        def attention(layer, rope, x, positions, kv):
            x = entering(x, positions)
            attended, kv = layer.attention.cached(layer.attention_norm(x), positions, rope, kv)
            residual = (x + attended).reshape(-1, a.d_model)
            return residual, layer.expert_norm(residual), kv

        def dense_layer(graph, weights, rope, x, positions, kv):
            layer = nnx.merge(graph, weights)
            residual, h, kv = attention(layer, rope, x, positions, kv)
            y = residual + layer.feed_forward(h)
            return still(y, a.top_k) if isinstance(x, Stream) else y.reshape(x.shape), kv

        def route(graph, weights, rope, x, positions, kv):
            layer = nnx.merge(graph, weights)
            residual, h, kv = attention(layer, rope, x, positions, kv)
            logits = layer.router.logits(h)
            ids, gates = layer.router.choose(logits)
            if layer.shared is not None:
                residual = residual + layer.shared(h)
            outputs = jnp.zeros((residual.shape[0] * a.top_k, a.d_model), h.dtype)
            told: Any = None if platform == "cpu" else for_host(ids, platform)  # an output more has its price
            return Routed(residual, h, logits, ids, gates, outputs, told), kv

        def join(chunks):
            h = jnp.concatenate(chunks)
            return h, jnp.zeros((h.shape[0] * a.top_k, a.d_model), h.dtype)

        def split(outputs):
            return jnp.split(outputs, CHUNKS)

        def combine(residual, outputs, gates, x):
            return _combined(residual, outputs, gates).reshape(x.shape)

        def head(norm, weight, x):
            x = _combined(*x) if isinstance(x, Stream) else x[:, 0]
            return linear(nnx.merge(norm_graph, norm)(x), weight).astype(jnp.float32)

        kinds: dict[Any, Any] = {}
        for layer, kind in zip(decoder.layers, a.layers, strict=True):
            if kind not in kinds:
                stage = functools.partial(route if kind.dense_ff is None else dense_layer, nnx.graphdef(layer))
                kinds[kind] = jit(stage, donate_argnums=4)
        self._layers = [kinds[kind] for kind in a.layers]
        self.experts = jit(functools.partial(run_experts, a.experts.activation), donate_argnums=0)
        self.chosen = jit(functools.partial(run_chosen, a.experts.activation), donate_argnums=0)
        self.held = jit(functools.partial(run_held, a.experts.activation), donate_argnums=0)
        self.join, self.split, self.combine = jit(join), jit(split), jit(combine)
        self._embed, self._begin, self._head = jit(embed), jit(begin), jit(head)

    def embed(self, dense: Any, tokens: Any) -> jax.Array:
        """x [B, T, D] of tokens int32 [B, T]."""
        # Only what is read is handed over: a call takes longer for every array among its arguments.
        return self._embed(dense["embedding"], tokens)

    def begin(self, dense: Any, tokens: jax.Array, positions: np.ndarray) -> tuple[Stream, jax.Array]:
        """What enters a decode step's first layer, of tokens int32 [B] at positions int32 [B]; these as [B, 1]."""
        return self._begin(dense["embedding"], tokens, positions)

    def head(self, dense: Any, x: Any) -> jax.Array:
        """Float32 logits [B, V] of x, a `Stream` or [B, 1, D]."""
        return self._head(dense["norm"], dense.get("head", dense["embedding"]), x)

    def route(self, layer: int, dense: Any, rope: Any, x: Any, positions: Any, kv: KVCache) -> Routed:
        """Everything of a layer with experts up to its experts. Replaces the layer's cache in `kv` (donated).

        Args:
          layer: counted among all layers.
          dense: all dense weights; rope: `rope`'s table; x: [B, T, D], or a `Stream`; positions: int32 [B, T].
        """
        routed, kv[layer] = self._layers[layer](dense["layers"][layer], rope, x, positions, kv[layer])
        return routed if routed.told is not None else routed._replace(told=routed.ids)

    def dense_layer(self, layer: int, dense: Any, rope: Any, x: Any, positions: Any, kv: KVCache) -> jax.Array:
        """A whole layer without experts, x (as for `route`) to x. Replaces the layer's cache in `kv` (donated)."""
        x, kv[layer] = self._layers[layer](dense["layers"][layer], rope, x, positions, kv[layer])
        return x

    def kv_cache(self, batch: int, capacity: int) -> KVCache:
        """Zeroed cache of `capacity` positions per row."""
        a = self.architecture
        shapes = MODULES[type(a.attention)].cache_shapes(a.attention, batch, capacity)
        return [tuple(committed(jnp.zeros(shape, self.dtype)) for shape in shapes) for _ in a.layers]

    def rope(self, capacity: int) -> jax.Array:
        """Rotary table for `capacity` positions, on the device."""
        a = self.architecture
        return committed(rope_table(capacity, a.attention.rope_dim, a.rope))


def still(x: Any, top_k: int) -> Stream:
    """x [R, D] with nothing to add."""
    rows, width = x.shape
    return Stream(x, np.zeros((rows * top_k, width), x.dtype), np.zeros((rows, top_k), np.float32))


def _combined(residual: jax.Array, outputs: jax.Array, gates: jax.Array) -> jax.Array:
    """The residual [R, D] plus gates times outputs, in router order."""
    mixed = jnp.einsum("rkd,rk->rd", outputs.reshape(*gates.shape, -1), gates.astype(outputs.dtype))
    return residual + mixed


def committed(tree: Any) -> Any:
    """Arrays on the first device, tied to it: one executable serves all calls only if all agree on that."""
    return jax.device_put(tree, SingleDeviceSharding(jax.devices()[0], memory_kind="device"))


def device_weights(dense: Any, dtype: Any) -> dict[str, Any]:
    """Dense checkpoint arrays (a pure dict of `layers.Decoder`) on the device in the compute dtype."""

    leaves, tree = jax.tree_util.tree_flatten_with_path(dense)
    # float32 whatever the compute dtype: see `Router`
    kept = [path[-1] == jax.tree_util.DictKey("correction_bias") for path, _ in leaves]
    dtypes = [np.dtype(np.float32 if keep else dtype) for keep in kept]
    return jax.tree.unflatten(tree, placed([np.asarray(x) for _, x in leaves], dtypes))


def placed(arrays: Sequence[np.ndarray], dtypes: Sequence[np.dtype]) -> list[jax.Array]:
    """`committed` arrays in these dtypes; on a CPU they lie together."""
    if jax.devices()[0].platform == "cpu":
        return committed(together(arrays, dtypes))
    return [committed(x.astype(dtype)) for x, dtype in zip(arrays, dtypes, strict=True)]

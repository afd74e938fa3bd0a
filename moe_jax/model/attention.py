"""Attention modules, one per `AttentionKind`. Each gives `full` (no cache), `cached`, and the shapes of its cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model import cpu
from moe_jax.model.architecture import Architecture, GroupedQuery, LayerKind
from moe_jax.model.primitives import RMSNorm, linear
from moe_jax.model.rope import apply_rope

BLOCK, BLOCK_OF_ONE = 512, 64
"""Positions of the cache that several tokens, and one where cpu.py does not suit, attend over at a time. Each block is
copied; a small one stays in the processor's cache (9 heads, 1,500 positions: 0.56 ms, in blocks of 512 0.64)."""


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, sinks: jax.Array | None = None
) -> jax.Array:
    """Grouped-query attention.

    Args:
      q: [B, T, N, H]; k: [B, G, S, H]; v: [B, G, S, Hv].
      mask: bool [B or 1, T, S].
      scale: of the scores.
      sinks: [N], a logit of each head that takes its share of the softmax and adds nothing.

    Returns:
      [B, T, N, Hv].
    """
    B, T, N, H = q.shape
    G = k.shape[1]
    q = q.reshape(B, T, G, N // G, H)
    scores = jnp.einsum("btgmh,bgsh->bgmts", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = sinks.astype(jnp.float32).reshape(1, G, N // G, 1, 1)
        highest = jnp.maximum(scores.max(-1, keepdims=True), sink)
        weights = jnp.exp(scores - highest)
        weights = weights / (weights.sum(-1, keepdims=True) + jnp.exp(sink - highest))
    return jnp.einsum("bgmts,bgsh->btgmh", weights.astype(v.dtype), v).reshape(B, T, N, v.shape[-1])


def causal_attend(q: jax.Array, k: jax.Array, v: jax.Array, blocks: int = 4) -> jax.Array:
    """Causal attention over whole sequences, q [B, T, N, H], k and v [B, T, G, H], in blocks of queries.

    A block reads only the keys up to its end, and keys are repeated per query head: on a CPU this trains 2.5 times
    faster than `attend` under a full mask (B 32, T 256, N 6), and is otherwise the same computation.
    """
    T, N, H = q.shape[1:]
    blocks = blocks if T % blocks == 0 else 1
    q = (q * H**-0.5).swapaxes(1, 2)  # [B, N, T, H]
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2).swapaxes(1, 2) for x in (k, v))
    out, width = [], T // blocks
    for start in range(0, T, width):
        end = start + width
        scores = jnp.einsum("bnth,bnsh->bnts", q[:, :, start:end], k[:, :, :end], preferred_element_type=jnp.float32)
        mask = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
        scores = jnp.where(mask, scores, -1e30)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        mixed = jnp.einsum("bnts,bnsh->bnth", weights.astype(v.dtype), v[:, :, :end])
        out.append(mixed / weights.sum(-1, keepdims=True).astype(v.dtype))
    return jnp.concatenate(out, axis=2).swapaxes(1, 2)


def write_cache(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """`new [B, T, G, H]` at each row's `positions [B, T]` of `cache [B, G, S, H]`; from S on nowhere."""
    row = jnp.arange(new.shape[0])[:, None]
    return cache.at[row, :, positions].set(new.astype(cache.dtype), mode="drop")


def cache_mask(positions: jax.Array, slots: jax.Array, window: int | None) -> jax.Array:
    """Which cache slots each new token sees: positions int32 [B, T] and slots int32 [S] to bool [B, T, S]."""
    # Slots past a row's own position hold nothing, padding, or an earlier owner: the mask never reads them.
    slot, own = slots[None, None], positions[:, :, None]
    mask = slot <= own
    return mask if window is None else mask & (slot > own - window)


def attend_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scale: float,
    window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`attend` of new tokens over a cache, which holds them too: each sees the slots up to its own position.

    Args:
      q: [B, T, N, H]; k: [B, G, S, H]; v: [B, G, S, Hv]; slot s holds position s.
      positions: of the new tokens, int32 [B, T].
      scale: of the scores; window: most positions that a token sees, its own included; sinks: as for `attend`.

    Returns:
      [B, T, N, Hv].
    """

    def blocks(q, k, v, positions):
        # One token never goes over all at once: XLA would write the cache within what reads it, and copy it for each.
        slots = k.shape[2]
        width = min(BLOCK, slots) if q.shape[1] > 1 else min(BLOCK_OF_ONE, max(1, slots // 2))
        return _attend_blocks(q, k, v, positions, scale, window, sinks, width)

    def whole(q, k, v, positions):
        return attend(q, k, v, cache_mask(positions, jnp.arange(k.shape[2]), window), scale, sinks)

    if q.shape[1] > 1:
        return blocks(q, k, v, positions)

    def one(q, k, v, positions):
        if not cpu.attends(q, v):
            return blocks(q, k, v, positions)
        B, _, N, H = q.shape
        G, S, Hv = v.shape[1:]
        position = positions[:, 0]
        first = jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0)
        end = jnp.where(position < S, position + 1, 0)  # others are padding
        heads = cpu.attend(q.reshape(B, G, -1, H) * scale, k, v, first, end, _start(sinks, (G, N // G)))
        return heads.reshape(B, 1, N, Hv)

    # To an accelerator one token is no work: there every turn of a loop would cost more than reading what is empty.
    return jax.lax.platform_dependent(q, k, v, positions, cpu=one, default=whole)


def _start(sinks: jax.Array | None, heads: tuple[int, int]) -> jax.Array:
    """Before anything is attended to: highest score and total weight of each head, float32 [2, G, N / G]."""
    if sinks is None:
        return jnp.stack([jnp.full(heads, -1e30, jnp.float32), jnp.zeros(heads, jnp.float32)])  # finite: no inf - inf
    return jnp.stack([sinks.astype(jnp.float32).reshape(heads), jnp.ones(heads, jnp.float32)])


def _attend_blocks(q, k, v, positions, scale, window, sinks, width):
    """Goes over the cache in blocks of `width` slots, from the first that any token sees to the last, with the running
    softmax of arXiv 1805.02867: empty capacity costs nothing, scores take a block's memory, and one executable serves
    every length. A block that a token does not see changes no bit of it."""
    B, T, N, H = q.shape
    G, S, Hv = v.shape[1:]
    # Rows of a product are a key head's query heads and tokens: [B, G, N / G * T, H].
    q = q.reshape(B, T, G, N // G, H).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, H)
    rows = q.shape[:3]

    def step(i, carry):
        mixed, highest, total = carry
        start = jnp.minimum(i * width, S - width)  # the last block may reach back into the one before
        block = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=2)  # [B, G, width, ...]
        slots = start + jnp.arange(width)
        mask = cache_mask(positions, slots, window) & (slots >= i * width)[None, None]
        scores = jnp.einsum("bgrh,bgsh->bgrs", q, block(k), preferred_element_type=jnp.float32) * scale
        scores = jnp.where(mask[:, None, None], scores.reshape(B, G, -1, T, width), -jnp.inf).reshape(*rows, width)
        raised = jnp.maximum(highest, scores.max(-1))
        weights, keep = jnp.exp(scores - raised[..., None]), jnp.exp(highest - raised)
        added = jnp.einsum("bgrs,bgsh->bgrh", weights.astype(v.dtype), block(v), preferred_element_type=jnp.float32)
        return mixed * keep[..., None] + added, raised, total * keep + weights.sum(-1)

    start = _start(sinks, (G, N // G))[:, None, ..., None]
    highest, total = jnp.broadcast_to(start, (2, B, G, N // G, T)).reshape(2, *rows)
    first = 0 if window is None else jnp.maximum(positions.min() - window + 1, 0) // width
    last = jnp.where(positions < S, positions, 0).max() // width  # others are padding
    mixed = jnp.zeros((*rows, Hv), jnp.float32)
    mixed, _, total = jax.lax.fori_loop(first, last + 1, step, (mixed, highest, total))
    total = jnp.maximum(total, 1e-30)  # padding may see nothing; the total of others is at least 1
    heads = (mixed / total[..., None]).astype(v.dtype).reshape(B, N, T, Hv)
    return heads.swapaxes(1, 2)


class Attention(nnx.Module):
    """`GroupedQuery` attention; query, key and value weights are one array."""

    def __init__(self, a: Architecture, kind: LayerKind, dtype, *, rngs: nnx.Rngs, std: float = 0.02):
        spec = a.attention
        assert isinstance(spec, GroupedQuery)
        N, G, H = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.spec, self.window, self.interleaved = spec, kind.window, a.rope.interleaved
        init = nnx.initializers.normal(std)
        self.qkv = nnx.Param(init(rngs.params(), ((N + 2 * G) * H, a.d_model), dtype))
        self.out = nnx.Param(init(rngs.params(), (a.d_model, N * H), dtype))
        self.qkv_bias = nnx.Param(jnp.zeros((N + 2 * G) * H, dtype)) if spec.qkv_bias else None
        self.out_bias = nnx.Param(jnp.zeros(a.d_model, dtype)) if spec.out_bias else None
        widths = {"none": None, "head": (H, H), "full": (N * H, G * H)}[spec.qk_norm]
        self.q_norm = RMSNorm(widths[0], a.norm_eps, dtype) if widths else None
        self.k_norm = RMSNorm(widths[1], a.norm_eps, dtype) if widths else None
        self.sinks = nnx.Param(jnp.zeros(N, dtype)) if spec.sinks else None

    @staticmethod
    def cache_shapes(spec: GroupedQuery, batch: int, capacity: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the cached arrays: keys and values, [B, G, S, H]: what a head attends over lies together."""
        return ((batch, spec.num_kv_heads, capacity, spec.head_dim),) * 2

    def project(self, x: jax.Array, rope: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D], rope [B or 1, T, 2, H / 2]: rotated q [B, T, N, H], rotated k and plain v [B, T, G, H]."""
        s = self.spec
        N, G, H = s.num_heads, s.num_kv_heads, s.head_dim
        heads = linear(x, self.qkv[...], None if self.qkv_bias is None else self.qkv_bias[...])
        heads = heads.reshape(*x.shape[:2], N + 2 * G, H)
        q, k, v = heads[:, :, :N], heads[:, :, N : N + G], heads[:, :, N + G :]
        if self.q_norm is not None and self.k_norm is not None:
            # Over each head, or over all heads as one vector.
            widen = (lambda x: x.reshape(*x.shape[:2], -1)) if s.qk_norm == "full" else lambda x: x
            q, k = self.q_norm(widen(q)).reshape(q.shape), self.k_norm(widen(k)).reshape(k.shape)
        if s.clip_qkv is not None:
            q, k, v = (jnp.clip(x, -s.clip_qkv, s.clip_qkv) for x in (q, k, v))
        return apply_rope(q, rope, self.interleaved), apply_rope(k, rope, self.interleaved), v

    def output(self, heads: jax.Array) -> jax.Array:
        """heads [B, T, N, H] to the residual stream [B, T, D]."""
        bias = None if self.out_bias is None else self.out_bias[...]
        return linear(heads.reshape(*heads.shape[:2], -1), self.out[...], bias)

    def full(self, x: jax.Array, rope: jax.Array) -> jax.Array:
        """Causal attention over whole sequences x [B, T, D], rope [1, T, 2, H / 2], no cache (training)."""
        assert self.window is None and self.sinks is None, "training knows no sliding windows and no sinks"
        return self.output(causal_attend(*self.project(x, rope)))

    def cached(
        self, x: jax.Array, positions: jax.Array, rope: jax.Array, kv: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Attention of new tokens over the cache and themselves.

        Args:
          x: normalised residual of the new tokens, [B, T, D].
          positions: their absolute positions, int32 [B, T]; a position >= S is written nowhere (padding).
          rope: `rope_table` for at least S positions, [>= S, 2, H / 2].
          kv: key and value cache, each [B, G, S, H]. Slot s holds position s of its row.

        Returns:
          Output [B, T, D] and the updated cache.
        """
        q, k, v = self.project(x, rope[positions])
        keys, values = write_cache(kv[0], k, positions), write_cache(kv[1], v, positions)
        sinks = None if self.sinks is None else self.sinks[...]
        heads = attend_cache(q, keys, values, positions, q.shape[-1] ** -0.5, self.window, sinks)
        return self.output(heads), (keys, values)

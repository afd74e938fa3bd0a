"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): what is cached of a token is one narrow
vector for all heads together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.architecture import Architecture, Latent, LayerKind
from moe_jax.model.attention import attend_cache, causal_attend, write_cache
from moe_jax.model.primitives import RMSNorm, linear
from moe_jax.model.rope import apply_rope


class LatentAttention(nnx.Module):
    """`Latent` attention. P is the rotated width `rope_dim`, C the latent's `kv_rank`.

    A head's score is q . (up_k latent) + q_rope . k_rope = (up_k^T q) . latent + q_rope . k_rope. Cached attention
    computes the latter (the paper's "absorbed" form): every head then shares the cache as its one key, and as its value
    too, and no key or value of a head is ever made.
    """

    def __init__(self, a: Architecture, kind: LayerKind, dtype, *, rngs: nnx.Rngs, std: float = 0.02):
        s = a.attention
        assert isinstance(s, Latent)
        self.spec, self.window, self.interleaved = s, kind.window, a.rope.interleaved
        weight = lambda *shape: nnx.Param(nnx.initializers.normal(std)(rngs.params(), shape, dtype))
        bias = lambda width: nnx.Param(jnp.zeros(width, dtype)) if s.bias else None
        rank = s.q_rank
        self.q_down = None if rank is None else weight(rank, a.d_model)
        self.q_down_bias = None if rank is None else bias(rank)
        self.q_norm = None if rank is None else RMSNorm(rank, s.norm_eps, dtype)
        self.q_up = weight(s.num_heads * (s.nope_dim + s.rope_dim), rank or a.d_model)
        self.kv_down = weight(s.kv_rank + s.rope_dim, a.d_model)
        self.kv_down_bias = bias(s.kv_rank + s.rope_dim)
        self.kv_norm = RMSNorm(s.kv_rank, s.norm_eps, dtype)
        self.kv_up = weight(s.num_heads * (s.nope_dim + s.v_dim), s.kv_rank)  # by head: key rows, then value rows
        self.out = weight(a.d_model, s.num_heads * s.v_dim)
        self.out_bias = bias(a.d_model)

    @staticmethod
    def cache_shapes(spec: Latent, batch: int, capacity: int) -> tuple[tuple[int, ...], ...]:
        """Shape of the one cached array: the latent, then the rotated key, [B, 1, S, C + P]: as one head's."""
        return ((batch, 1, capacity, spec.kv_rank + spec.rope_dim),)

    def project(self, x: jax.Array, rope: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D], rope [B or 1, T, 2, P / 2]: plain q [B, T, N, nope], rotated q [B, T, N, P], and what is cached
        [B, T, C + P]."""
        s = self.spec
        if self.q_down is not None and self.q_norm is not None:
            q = linear(self.q_norm(linear(x, self.q_down[...], _value(self.q_down_bias))), self.q_up[...])
        else:
            q = linear(x, self.q_up[...])
        q = q.reshape(*x.shape[:2], s.num_heads, s.nope_dim + s.rope_dim)
        down = linear(x, self.kv_down[...], _value(self.kv_down_bias))
        key = apply_rope(down[:, :, None, s.kv_rank :], rope, self.interleaved)[:, :, 0]
        cached = jnp.concatenate([self.kv_norm(down[..., : s.kv_rank]), key], axis=-1)
        return q[..., : s.nope_dim], apply_rope(q[..., s.nope_dim :], rope, self.interleaved), cached

    def output(self, heads: jax.Array) -> jax.Array:
        """heads [B, T, N, Hv] to the residual stream [B, T, D]."""
        return linear(heads.reshape(*heads.shape[:2], -1), self.out[...], _value(self.out_bias))

    def up(self) -> tuple[jax.Array, jax.Array]:
        """What makes keys [N, nope, C] and values [N, Hv, C] of the latent."""
        s = self.spec
        both = self.kv_up[...].reshape(s.num_heads, s.nope_dim + s.v_dim, s.kv_rank)
        return both[:, : s.nope_dim], both[:, s.nope_dim :]

    def full(self, x: jax.Array, rope: jax.Array) -> jax.Array:
        """Causal attention over whole sequences x [B, T, D], rope [1, T, 2, P / 2], no cache (training): every head's
        keys and values are made."""
        assert self.window is None, "training knows no sliding windows"
        s = self.spec
        q, q_rope, cached = self.project(x, rope)
        latent, key = cached[..., : s.kv_rank], cached[..., s.kv_rank :]
        k, v = (jnp.einsum("btc,nhc->btnh", latent, up) for up in self.up())
        key = jnp.broadcast_to(key[:, :, None], (*k.shape[:3], s.rope_dim))
        q = jnp.concatenate([q, q_rope], axis=-1)
        q = q * (s.score_scale * q.shape[-1] ** 0.5)  # causal_attend divides by the root
        return self.output(causal_attend(q, jnp.concatenate([k, key], axis=-1), v))

    def cached(
        self, x: jax.Array, positions: jax.Array, rope: jax.Array, kv: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """As `Attention.cached`; `kv` is the one array of `cache_shapes`."""
        s = self.spec
        q, q_rope, new = self.project(x, rope[positions])
        cache = write_cache(kv[0], new[:, :, None], positions)
        up_k, up_v = self.up()
        q = jnp.concatenate([jnp.einsum("btnh,nhc->btnc", q, up_k), q_rope], axis=-1)
        # The value is the whole cache, so that none of it is copied; what comes of the rotated keys is cut off.
        mixed = attend_cache(q, cache, cache, positions, s.score_scale, self.window)[..., : s.kv_rank]
        return self.output(jnp.einsum("btnc,nhc->btnh", mixed, up_v)), (cache,)


def _value(param: nnx.Param | None) -> jax.Array | None:
    return None if param is None else param[...]

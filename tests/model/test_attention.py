"""Attention over a cache in blocks, against one that is written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import attention
from moe_jax.model.attention import attend_cache

B, T, N, G, H, BLOCK = 2, 6, 4, 2, 8, 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", BLOCK)
    monkeypatch.setattr(attention, "BLOCK_OF_ONE", BLOCK // 2)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def written_out(q, k, v, positions, scale, window, sinks):
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(q.shape[:3]):
        own, group = int(positions[b, t]), n // (N // G)
        first = 0 if window is None else max(0, own - window + 1)
        scores = k[b, first : own + 1, group].astype(np.float64) @ q[b, t, n] * scale
        weights = np.exp(scores)
        rest = 0.0 if sinks is None else np.exp(float(sinks[n]))
        out[b, t, n] = weights @ v[b, first : own + 1, group] / (weights.sum() + rest)
    return out


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5, 20])
# In one block, over two, at an edge, to the end of a cut block, and one token.
@pytest.mark.parametrize(("start", "T"), [(0, 6), (12, 6), (16, 6), (34, 6), (37, 1)])
def test_blocks_give_what_whole_attention_gives(start, T, window, sinks):
    S = 40  # no multiple of a block
    q, k, v, sink = random(B, T, N, H), random(B, S, G, H), random(B, S, G, H + 1), random(N) if sinks else None
    positions = np.stack([start + np.arange(T), np.maximum(start - 3, 0) + np.arange(T)]).astype(np.int32)
    after = np.arange(S) > positions.max()
    k[:, after], v[:, after] = 1e4, 1e4  # what an earlier owner left
    cache = k.swapaxes(1, 2), v.swapaxes(1, 2)
    got = jax.jit(attend_cache, static_argnums=5)(q, *cache, positions, 0.3, window, sink)
    np.testing.assert_allclose(got, written_out(q, k, v, positions, 0.3, window, sink), rtol=0, atol=2e-6)


def test_blocks_that_nobody_sees_are_not_read():
    q, k, v = random(B, T, N, H), random(B, G, 64, H), random(B, G, 64, H)
    k[:, :, :BLOCK], k[:, :, 3 * BLOCK :] = np.nan, np.nan
    v[:, :, :BLOCK], v[:, :, 3 * BLOCK :] = np.nan, np.nan
    positions = np.broadcast_to(40 + np.arange(T, dtype=np.int32), (B, T))
    q, k, v, positions = (jnp.asarray(x) for x in (q, k, v, positions))
    assert np.isfinite(attend_cache(q, k, v, positions, 0.3, window=20)).all()
    assert np.isnan(attend_cache(q, k, v, positions + 3, 0.3, window=30)).any()
    ended = jnp.concatenate([positions[:1], jnp.full((1, T), 64)])  # a row that only pads
    assert np.isfinite(attend_cache(q, k, v, ended, 0.3, window=10)).all()

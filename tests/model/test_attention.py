"""Attention over a cache in blocks, against one that is written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.model import attention, cpu
from moe_jax.model.attention import attend_cache, cache_mask

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
        own, group = int(positions[b, t]), n // (q.shape[2] // k.shape[2])
        first = 0 if window is None else max(0, own - window + 1)
        scores = k[b, first : own + 1, group].astype(np.float64) @ q[b, t, n] * scale
        sink = -np.inf if sinks is None else float(sinks[n])
        highest = max(scores.max(), sink)
        weights = np.exp(scores - highest)
        out[b, t, n] = weights @ v[b, first : own + 1, group] / (weights.sum() + np.exp(sink - highest))
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


@settings(max_examples=60, deadline=None)
@given(
    heads=st.tuples(st.integers(2, 4), st.integers(1, 3)),
    widths=st.tuples(st.sampled_from([16, 48]), st.sampled_from([16, 32])),
    capacity=st.integers(1, 60),
    positions=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 5, 17]),
    with_sinks=st.booleans(),
    steep=st.sampled_from([0.3, 10.0]),
    block=st.sampled_from([64, 4096, 1 << 17]),
)
def test_one_token_on_a_cpu(heads, widths, capacity, positions, window, with_sinks, steep, block):
    """Reads its own slots only; the bits of a row do not depend on others, on capacity, and on how work is shared."""
    (G, M), (H, Hv), B = heads, widths, len(positions)
    q, sink = random(B, 1, G * M, H), jnp.asarray(random(G * M)) if with_sinks else None
    k, v = random(B, capacity, G, H), random(B, capacity, G, Hv)
    own = np.array(positions, np.int32)[:, None]
    seen = np.asarray(cache_mask(jnp.asarray(own), jnp.arange(capacity), window))[:, 0] & (own < capacity)
    cache = [jnp.asarray(np.where(seen[..., None, None], x, np.nan).swapaxes(1, 2)) for x in (k, v)]
    q = jnp.asarray(q)
    assert cpu.attends(q, cache[1])

    def attended(rows, cache, block):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "_BLOCK_BYTES", block)
            keys, values = (x[rows] for x in cache)
            return np.asarray(attend_cache(q[rows], keys, values, jnp.asarray(own[rows]), steep, window, sink))

    got = attended(slice(None), cache, block)
    real = own[:, 0] < capacity
    if real.any():
        want = written_out(q[real], k[real], v[real], own[real], steep, window, sink)
        np.testing.assert_allclose(got[real], want, rtol=0, atol=2e-3 if steep > 1 else 2e-6)
    np.testing.assert_array_equal(got[~real], 0)
    larger = [jnp.pad(x, ((0, 0), (0, 0), (0, 7), (0, 0)), constant_values=np.nan) for x in cache]
    for row in np.flatnonzero(real):
        np.testing.assert_array_equal(attended(slice(row, row + 1), larger, 1 << 17), got[row : row + 1])


def test_what_is_not_finite_is_seen_on_a_cpu():
    q, k, v = random(1, 1, 4, 16), random(1, 2, 40, 16), random(1, 2, 40, 16)
    k[0, 1, 3, 5] = np.nan
    q, k, v, position = (jnp.asarray(x) for x in (q, k, v, np.array([[20]], np.int32)))
    got = np.asarray(attend_cache(q, k, v, position, 0.3))
    assert np.isfinite(got[0, 0, :2]).all() and np.isnan(got[0, 0, 2:]).all()

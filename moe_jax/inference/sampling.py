"""Choosing the next token: greedy, temperature, top-k, top-p, reproducible from a seed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"--temperature must be 0 (greedy) or above, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top_k must be 0 (off) or above, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")


@functools.partial(jax.jit, static_argnums=1)
def sample(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    """Next token ids, int32 [B], from logits float32 [B, V].

    A row's draw depends on the seed, the step and the row's index alone.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        scaled = jnp.where(scaled < jax.lax.top_k(scaled, sampling.top_k)[0][:, -1:], -jnp.inf, scaled)
    if sampling.top_p < 1:
        ranked = jnp.sort(scaled, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ranked), axis=-1) - jax.nn.softmax(ranked)
        # The nucleus (arXiv 1904.09751): the fewest tokens whose probability reaches top_p; ties stay in.
        floor = jnp.min(jnp.where(before < sampling.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
    key = jax.random.fold_in(jax.random.key(sampling.seed), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

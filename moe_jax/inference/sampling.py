"""Choosing the next token: greedy, temperature, top-k, top-p, reproducible from a seed."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be 0 (greedy) or above, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top_k must be 0 (off) or above, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"--seed must fit 64 bits, {self.seed} does not")


class Sampler:
    """Draws tokens. No executable is made for a seed, a temperature or a nucleus of its own."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        numbers = np.float32(sampling.temperature), np.float32(sampling.top_p)
        self._arguments = jax.device_put((jax.random.key(sampling.seed), *numbers))

    def __call__(self, logits: jax.Array, step: int) -> jax.Array:
        """Next token ids, int32 [B], from logits float32 [B, V].

        A row's draw depends on the seed, the step and the row's index alone.
        """
        if self._sampling.temperature == 0:
            return _likeliest(logits)
        return _draw(logits, *self._arguments, np.int32(step), self._sampling.top_k, self._sampling.top_p < 1)


@jax.jit
def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("top_k", "nucleus"))
def _draw(logits, key, temperature, top_p, step, top_k, nucleus):
    scaled = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        scaled = jnp.where(scaled < jax.lax.top_k(scaled, top_k)[0][:, -1:], -jnp.inf, scaled)
    if nucleus:
        ranked = jnp.sort(scaled, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ranked), axis=-1) - jax.nn.softmax(ranked)
        # The nucleus (arXiv 1904.09751): the fewest tokens whose probability reaches top_p; ties stay in.
        floor = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

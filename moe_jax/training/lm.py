"""Loss and forward pass of the trainable language model: full sequences, capacity dispatch, auxiliary losses.

Parameters are one pytree: `{"dense": pure dict of layers.Decoder, "experts": [per layer {"gate_up", "down"}]}` with
experts stacked, [E, 2F, D] and [E, D, F].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.architecture import Architecture, Experts
from moe_jax.model.layers import Decoder
from moe_jax.model.primitives import linear
from moe_jax.model.rope import rope_table

Params = dict[str, Any]


def init_params(a: Architecture, seed: int, std: float = 0.02) -> tuple[Any, Params]:
    """Returns the NNX graph definition of the dense part and freshly initialised parameters (float32).

    `a` is a Mixtral (`checkpoint.families.mixtral.architecture`): experts in every layer, none shared, no biases.
    """
    assert a.num_moe_layers == a.num_layers and a.experts == Experts(a.num_experts, a.experts.ff) and not a.shared
    out_std = std / (2 * a.num_layers) ** 0.5  # GPT-2: the residual stream keeps its scale over depth
    decoder = Decoder(a, rngs=nnx.Rngs(params=jax.random.key(seed)), std=std, out_std=out_std)
    graph, state = nnx.split(decoder)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), (a.num_layers, 2))
    shapes = a.expert_shapes()
    experts = [
        {
            "gate_up": std * jax.random.normal(keys[layer, 0], (a.num_experts, *shapes["gate_up"])),
            "down": out_std * jax.random.normal(keys[layer, 1], (a.num_experts, *shapes["down"])),
        }
        for layer in range(a.num_layers)
    ]
    return graph, {"dense": nnx.to_pure_dict(state), "experts": experts}


def dispatch_experts(
    h: jax.Array, ids: jax.Array, gates: jax.Array, gate_up: jax.Array, down: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Runs K experts per token at the cost of K (not E) by sorting assignments into E x capacity slots.

    Args:
      h: normalised residual [R, D]; ids and gates [R, K]; gate_up [E, 2F, D]; down [E, D, F].
      capacity: slots per expert C; assignments beyond it are dropped (their expert adds nothing).

    Returns:
      The weighted sum of expert outputs [R, D] and the share of assignments dropped.
    """
    R, K = ids.shape
    E = gate_up.shape[0]
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)  # [R * K]: assignments, grouped by expert
    counts = jnp.zeros(E, jnp.int32).at[flat].add(1)
    rank = jnp.arange(R * K) - (jnp.cumsum(counts) - counts)[flat[order]]
    slot = jnp.where(rank < capacity, flat[order] * capacity + rank, E * capacity)  # beyond capacity: out of range
    token_of_slot = jnp.full(E * capacity, R, jnp.int32).at[slot].set(order // K, mode="drop")
    slot_of_assignment = jnp.zeros(R * K, jnp.int32).at[order].set(slot)
    rows = jnp.take(h, token_of_slot, axis=0, mode="fill", fill_value=0).reshape(E, capacity, -1)
    gate, up = jnp.split(jnp.einsum("ecd,efd->ecf", rows, gate_up), 2, axis=-1)
    out = jnp.einsum("ecf,edf->ecd", jax.nn.silu(gate) * up, down).reshape(E * capacity, -1)
    per_assignment = jnp.take(out, slot_of_assignment, axis=0, mode="fill", fill_value=0).reshape(R, K, -1)
    return jnp.einsum("rkd,rk->rd", per_assignment, gates), jnp.mean(rank >= capacity)


def forward(a: Architecture, graph, params: Params, tokens: jax.Array, capacity_factor: float):
    """tokens int32 [B, T] to logits float32 [B, T, V] and statistics, each a mean over layers or [L, E].

    `balance` is the load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4), 1 when perfectly even, taken
    per sequence so that no expert starves within one domain (DeepSeek-V3, arXiv 2412.19437, eq. 17); `router_z` the
    router z-loss of ST-MoE (arXiv 2202.08906, eq. 5); `load` [L, E] the share of assignments.
    """
    decoder: Decoder = nnx.merge(graph, params["dense"])
    B, T = tokens.shape
    capacity = int(-(-B * T * a.top_k * capacity_factor // a.num_experts))
    x = decoder.embedding[...][tokens]
    rope = jnp.asarray(rope_table(T, a.attention.rope_dim, a.rope))[None]
    balance, router_z, dropped, load = [], [], [], []
    for layer, experts in zip(decoder.layers, params["experts"], strict=True):
        assert layer.router is not None
        x = x + layer.attention.full(layer.attention_norm(x), rope)
        h = layer.expert_norm(x).reshape(B * T, -1)
        logits = layer.router.logits(h)
        ids, gates = layer.router.choose(logits)
        out, lost = dispatch_experts(h, ids, gates, experts["gate_up"], experts["down"], capacity)
        x = x + out.reshape(x.shape)
        chosen = jax.nn.one_hot(ids, a.num_experts).mean(1).reshape(B, T, -1).mean(1)  # [B, E] share of assignments
        probability = jax.nn.softmax(logits).reshape(B, T, -1).mean(1)
        balance.append(a.num_experts * jnp.mean(jnp.sum(chosen * probability, -1)))
        router_z.append(jnp.mean(jax.nn.logsumexp(logits, -1) ** 2))
        dropped.append(lost)
        load.append(chosen.mean(0))
    logits = linear(decoder.norm(x), decoder.head_weight()).astype(jnp.float32)
    mean = lambda values: jnp.stack(values).mean()
    stats = {"balance": mean(balance), "router_z": mean(router_z), "dropped": mean(dropped), "load": jnp.stack(load)}
    return logits, stats


def loss_fn(a: Architecture, graph, params: Params, rows: jax.Array, weights, balance_loss):
    """rows int32 [B, T + 1]: mean cross-entropy in nats plus weighted auxiliary losses, and the statistics.

    `balance_loss` weighs the load balance; `weights` has the fields capacity_factor, router_z_loss and z_loss (squared
    log-normaliser of the output softmax, PaLM, arXiv 2204.02311).
    """
    logits, stats = forward(a, graph, params, rows[:, :-1], weights.capacity_factor)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
    stats["nll"] = jnp.mean(normaliser - picked)
    auxiliary = balance_loss * stats["balance"] + weights.router_z_loss * stats["router_z"]
    return stats["nll"] + auxiliary + weights.z_loss * jnp.mean(normaliser**2), stats

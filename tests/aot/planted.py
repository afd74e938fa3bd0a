"""Expert stages with a fault each, which the checks must find; arguments as of `run_experts` (SwiGLU)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.compute_on import compute_on

from moe_jax.model.architecture import SwiGLU
from moe_jax.model.experts import run_experts


def sound(outputs, h, rows, slots, weights):
    """No fault."""
    return run_experts(SwiGLU(), outputs, h, rows, slots, weights)


def upcast(outputs, h, rows, slots, weights):
    """Every expert is widened before it is used."""
    weights = jax.lax.optimization_barrier(jax.tree.map(lambda w: w.astype(jnp.float32), weights))
    outputs, after = sound(outputs.astype(jnp.float32), h.astype(jnp.float32), rows, slots, weights)
    return outputs.astype(h.dtype), after


def relayout(outputs, h, rows, slots, weights):
    """The rows of one matrix are put in another order: less than one expert, and still a copy of weights."""
    first = weights[0]
    gate_up = first.gate_up.reshape(2, -1, h.shape[1]).swapaxes(0, 1).reshape(first.gate_up.shape)
    return sound(outputs, h, rows, slots, (first._replace(gate_up=jax.lax.optimization_barrier(gate_up)), *weights[1:]))


def host_compute(outputs, h, rows, slots, weights):
    """The outputs are touched on the host."""
    outputs, after = sound(outputs, h, rows, slots, weights)
    with compute_on("device_host"):
        outputs = jax.jit(lambda x: x + 1)(outputs)
    return outputs, after


def host_memory(outputs, h, rows, slots, weights):
    """What the experts gave goes to the host too."""
    outputs, after = sound(outputs, h, rows, slots, weights)
    return outputs, after, jax.device_put(outputs, jax.memory.Space.Host)


def callback(outputs, h, rows, slots, weights):
    """Python is called in the middle."""
    outputs, after = sound(outputs, h, rows, slots, weights)
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(outputs.shape, outputs.dtype), outputs), after


PLANTED = {f.__name__: f for f in (sound, upcast, relayout, host_compute, host_memory, callback)}

"""What a predictor is asked and what it answers.

Additional dims: H horizon (the last axis but one of predictions), W windows of a log.
Horizon h, from 1, means the h-th layer reached after this one: layer `(l + h) % L`, of the next token if it wrapped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes that a predictor depends on; layers without experts are not counted."""

    num_layers: int
    num_experts: int
    top_k: int
    d_model: int
    norm_eps: float
    horizon: int

    def __post_init__(self):
        if not 1 <= self.horizon <= self.num_layers:
            raise UserError(
                f"a horizon of {self.horizon} does not fit a model of {self.num_layers} layers;"
                f" choose --config.prefetch.horizon from 1 to {self.num_layers}"
            )

    @classmethod
    def of(cls, a: Architecture, horizon: int) -> Spec:
        """The spec of a model of architecture `a`."""
        return cls(a.num_moe_layers, a.num_experts, a.top_k, a.d_model, a.norm_eps, horizon)

    @property
    def prior(self) -> float:
        """P(an expert is among the top K) when nothing is known."""
        return self.top_k / self.num_experts


class Features(NamedTuple):
    """What layer l knows once its router has run."""

    layer: Any  # int32 []
    residual: jax.Array  # [B, D], after attention and the shared expert are added, before the routed experts
    logits: jax.Array  # [B, E] float32 router logits
    ids: jax.Array  # [B, K] int32
    gates: jax.Array  # [B, K] float32


class ModelParts(NamedTuple):
    """The few weights of a model that predictors look at, float32."""

    routers: np.ndarray  # [L, E, D]
    expert_norms: np.ndarray  # [L, D]

    @classmethod
    def of(cls, dense: Any) -> ModelParts:
        """From dense weights: the pure dict of `layers.Decoder`, of any dtype, on the host or on a device."""
        layers = [layer for _, layer in sorted(dense["layers"].items()) if "router" in layer]
        stack = lambda name: np.stack([np.asarray(layer[name]["weight"]).astype(np.float32) for layer in layers])
        return cls(stack("router"), stack("expert_norm"))


def fingerprint(spec: Spec, parts: ModelParts) -> str:
    """Identifies a model by its sizes and routers, whatever the dtype it is loaded in and whatever the horizon."""
    sizes = dataclasses.replace(spec, horizon=1)
    digest = hashlib.sha256(repr(sizes).encode())
    for array in parts:
        # Rounded, so that a float32 checkpoint is the same model when it runs in bfloat16.
        digest.update(array.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


class Predictor(Protocol):
    """Scores the experts of the layers ahead. Stateless: what it learned is in `params`, what it remembers in `state`.

    Both are pytrees of arrays. `apply` is jitted by its callers and called once per layer, in order; the layer is data,
    so that all layers share one executable.
    """

    name: str

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        """Parameters (untrained)."""
        ...

    def init_state(self, spec: Spec, batch: int) -> Any:
        """The memory of a batch that has seen no token."""
        ...

    def prime(self, spec: Spec, ids: np.ndarray) -> Any:
        """The memory after prompts: ids int [L, B, T, K] of their tokens, -1 where a row has no token."""
        ...

    def apply(self, params: Any, state: Any, features: Features) -> tuple[jax.Array, Any]:
        """P(expert is among the true top K), float32 [B, H, E], and the new memory."""
        ...


def targets(offsets: jax.Array, layer: Any, num_layers: int) -> jax.Array:
    """Layers ahead of `layer`, int32 [H], for offsets 1..H."""
    return (layer + offsets) % num_layers


def multi_hot(ids: jax.Array, num_experts: int) -> jax.Array:
    """ids [..., K] to 0 and 1, float32 [..., E]; -1 sets nothing."""
    return jax.nn.one_hot(ids, num_experts, dtype=jnp.float32).sum(-2)


def last_ids(ids: np.ndarray) -> np.ndarray:
    """Experts of each row's last token, int32 [B, L, K], from ids [L, B, T, K] with -1 padding; -1 if it has none."""
    real = ids[0, :, :, 0] >= 0  # [B, T]
    last = real.shape[1] - 1 - np.flip(real, axis=1).argmax(axis=1)
    chosen = np.asarray(ids)[:, np.arange(len(last)), last]  # [L, B, K]
    found = np.asarray(real.any(axis=1))
    return np.where(found[:, None, None], chosen.swapaxes(0, 1), -1).astype(np.int32)

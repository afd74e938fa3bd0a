"""What a predictor is asked and what it answers.

Additional dims: H horizon (the last axis but one of predictions), W windows of a log.
Horizon h, from 1, means the h-th layer reached after this one: layer `(l + h) % L`, of the next token if it wrapped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture, Routing

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes that a predictor depends on; layers without experts are not counted."""

    num_layers: int
    num_experts: int
    d_model: int
    norm_eps: float
    horizon: int
    routing: Routing

    def __post_init__(self):
        if not 1 <= self.horizon <= self.num_layers:
            raise UserError(
                f"a horizon of {self.horizon} does not fit a model of {self.num_layers} layers;"
                f" choose --config.prefetch.horizon from 1 to {self.num_layers}"
            )

    @classmethod
    def of(cls, a: Architecture, horizon: int) -> Spec:
        """The spec of a model of architecture `a`."""
        return cls(a.num_moe_layers, a.num_experts, a.d_model, a.norm_eps, horizon, a.routing)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spec:
        """From what `dataclasses.asdict` made of one."""
        return cls(**{**values, "routing": Routing(**values["routing"])})

    @property
    def top_k(self) -> int:
        return self.routing.top_k

    @property
    def prior(self) -> float:
        """P(an expert is among the top K) when nothing is known."""
        return self.top_k / self.num_experts


class Features(NamedTuple):
    """What layer l knows once its router has run."""

    layer: Any  # int32 []
    residual: Array  # [B, D], after attention and the shared expert are added, before the routed experts
    logits: Array  # [B, E] float32 router logits
    ids: Array  # [B, K] int32
    gates: Array  # [B, K] float32, as the model uses them: scaled, renormalised or not


class Prediction(NamedTuple):
    """Of every layer up to the horizon, float32 [B, H, E]."""

    probability: jax.Array  # P(expert is among the true top K); NaN: the predictor does not belong to this run
    logits: jax.Array  # estimate of the target's router logits: `model.router.choose` makes ids and gates of them


class ModelParts(NamedTuple):
    """The few weights of a model that predictors look at, float32; what a model does not have is None."""

    routers: np.ndarray  # [L, E, D]
    expert_norms: np.ndarray  # [L, D]
    router_biases: np.ndarray | None = None  # [L, E]
    corrections: np.ndarray | None = None  # [L, E], added to the scores for the choice only

    @classmethod
    def of(cls, dense: Any) -> ModelParts:
        """From dense weights: the pure dict of `layers.Decoder`, of any dtype, on the host or on a device."""
        layers = [layer for _, layer in sorted(dense["layers"].items()) if "router" in layer]

        def stack(module: str, name: str) -> np.ndarray | None:
            found = [layer[module].get(name) for layer in layers]
            return None if found[0] is None else np.stack([np.asarray(x).astype(np.float32) for x in found])

        routers, norms = stack("router", "weight"), stack("expert_norm", "weight")
        assert routers is not None and norms is not None
        return cls(routers, norms, stack("router", "bias"), stack("router", "correction_bias"))


SAMPLE = 65536  # values of a dense array that the fingerprint looks at


def fingerprint(a: Architecture, dense: Any) -> str:
    """Identifies a model by its architecture and dense weights, whatever the dtype it is loaded in.

    Neither the experts' weights nor their width count: predictors know them by what they do to the residual, and a copy
    with inflated experts (`moe_jax/evaluation/inflate.py`) is the same model to them.

    Args:
      a: architecture.
      dense: pure dict of `layers.Decoder`, of any dtype, on the host or on a device.
    """
    same = dataclasses.replace(a, experts=dataclasses.replace(a.experts, ff=0))
    digest = hashlib.sha256(_plain(same).encode())
    for path, array in jax.tree_util.tree_leaves_with_path(dense):
        flat = np.asarray(array).reshape(-1)
        # Rounded, so that a float32 checkpoint is the same model when it runs in bfloat16. A sample tells models apart.
        sample = flat[:: -(-flat.size // SAMPLE)].astype(ml_dtypes.bfloat16)
        digest.update(jax.tree_util.keystr(path).encode() + sample.tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    """A description without the fields that are at their defaults: one that a later version adds changes nothing."""
    if not dataclasses.is_dataclass(value):
        return f"({', '.join(map(_plain, value))})" if isinstance(value, tuple) else repr(value)
    fields = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
    return f"{type(value).__name__}({', '.join(f'{f.name}={_plain(getattr(value, f.name))}' for f in fields)})"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rule:
    """How the model chooses experts, as part of a predictor's parameters: data to nobody, part of what is compiled."""

    routing: Routing


class Predictor(Protocol):
    """Scores the experts of the layers ahead. Stateless: what it learned is in `params`, what it remembers in `state`.

    Both are pytrees of arrays. `apply` is jitted by its callers and called once per layer, in order; the layer is data,
    so that all layers share one executable. A predictor with tables of its own for every layer may have a method
    `at(params, layer)`, which cuts out those that `apply` reads there; `apply` takes either.
    """

    name: str

    @property
    def begin(self) -> Callable[[Any, Any, jax.Array, Array], tuple[Prediction, Any]] | None:
        """`begin(params, state, embedding [B, D], tokens int32 [B])`, called before layer 0 of every decode step with
        the token that enters and its embedding: the prediction for layers 0..H-1 and the new memory.

        It is the only prediction for layer 0 that knows the token. None: what the last layer predicted has to do.
        """
        ...

    def init(self, rng: jax.Array, spec: Spec, parts: ModelParts) -> Any:
        """Parameters (untrained)."""
        ...

    def init_state(self, spec: Spec, batch: int) -> Any:
        """The memory of a batch that has seen no token."""
        ...

    def prime(self, spec: Spec, ids: np.ndarray, step: int = 0) -> Any:
        """The memory after tokens whose experts were ids int [L, B, T, K], -1 where a row has no token.

        They are those of the prompts, or the latest of those that were decoded while nobody asked for predictions;
        `step` decode steps are done.
        """
        ...

    def apply(self, params: Any, state: Any, features: Features) -> tuple[Prediction, Any]:
        """The prediction for the layers after this one, and the new memory."""
        ...


def at(predictor: Predictor, params: Any, layer: int) -> Any:
    """The parameters that `apply` reads at a layer, where the predictor can tell them apart; else all of them."""
    own = getattr(predictor, "at", None)
    return params if own is None else own(params, layer)


def targets(offsets: jax.Array, layer: Any, num_layers: int) -> jax.Array:
    """Layers ahead of `layer`, int32 [H], for offsets 1..H."""
    return (layer + offsets) % num_layers


def multi_hot(ids: Array, num_experts: int) -> jax.Array:
    """ids [..., K] to 0 and 1, float32 [..., E]; -1 sets nothing."""
    return jax.nn.one_hot(ids, num_experts, dtype=jnp.float32).sum(-2)


def last_ids(ids: np.ndarray) -> np.ndarray:
    """Experts of each row's last token, int32 [B, L, K], from ids [L, B, T, K] with -1 padding; -1 if it has none."""
    real = ids[0, :, :, 0] >= 0  # [B, T]
    last = real.shape[1] - 1 - np.flip(real, axis=1).argmax(axis=1)
    chosen = np.asarray(ids)[:, np.arange(len(last)), last]  # [L, B, K]
    found = np.asarray(real.any(axis=1))
    return np.where(found[:, None, None], chosen.swapaxes(0, 1), -1).astype(np.int32)

"""Configuration of inference: frozen dataclasses, made once at the door from a ConfigDict and checked there."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_type_hints

from moe_jax.errors import UserError

# Predictors and eviction policies: by name, the class, which is all that it takes to add one besides its file.
PREDICTORS = {
    "none": "",
    "random": "moe_jax.prediction.memory:Random",
    "frequency": "moe_jax.prediction.memory:Frequency",
    "repeat": "moe_jax.prediction.memory:Repeat",
    "router": "moe_jax.prediction.lookahead:Router",
    "default_vector": "moe_jax.prediction.lookahead:DefaultVector",
    "learned": "moe_jax.prediction.learned:Learned",
    "best_per_layer": "moe_jax.prediction.best:BestPerLayer",
    "oracle": "moe_jax.prediction.oracle:Oracle",
}
POLICIES = {
    "lru": "moe_jax.offload.policies:LRU",
    "lfu": "moe_jax.offload.policies:LFU",
    "least_stale": "moe_jax.offload.policies:LeastStale",
    "predicted": "moe_jax.offload.policies:Predicted",
    "belady": "moe_jax.offload.policies:Belady",
}
# Accepted values by field. A value of the design that is missing here is not implemented yet.
_CHOICES: dict[str, Collection[str]] = {
    "offload.tier": ("none", "host", "disk"),
    "offload.policy": POLICIES,
    "offload.upcast": ("stage", "arrival"),
    "offload.budget_scope": ("global", "layer"),
    "prefetch.predictor": PREDICTORS,
    "execution": ("exact", "speculative", "speculative_gated", "hybrid", "cache_aware"),
    "dtype": ("float32", "bfloat16"),
}
# Smallest accepted value by field.
_AT_LEAST = {
    "offload.link_gbps": 0,
    "prefetch.horizon": 1,
    "speculation.threshold": 0,
    "speculation.bonus": 0,
    "max_seq_len": 0,
    "prefill_chunk": 1,
    "batch_size": 1,
}
_AT_MOST = {"speculation.threshold": 1}


@dataclasses.dataclass(frozen=True)
class OffloadConfig:
    """Where experts live and how many bytes of them the device holds.

    Attributes:
      tier: "none" keeps every expert on the device, "host" keeps them in host memory, "disk" in the files of a
        converted checkpoint.
      device_budget: bytes of experts on the device, in flight included: "25%" of all, "512MiB", or "auto".
      host_budget: with tier "disk", bytes of experts kept in host memory besides, in the same notation; "0%": none.
      upcast: "stage" keeps experts in the checkpoint's dtype and widens them at each use; "arrival" widens them to the
        compute dtype once they are on the device, where they then take more of the budget.
      budget_scope: "global": layers compete for the budget; "layer": each has an equal share.
      policy: which expert leaves when the budget is full.
      trace: for policy "belady": the trace (`infer.py --trace`) of an earlier, equal run.
      link_gbps: 0, or the rate in GB/s (1e9 bytes) of a *simulated* link that slows every copy down.
    """

    tier: str = "host"
    device_budget: str = "25%"
    host_budget: str = "0%"
    upcast: str = "stage"
    budget_scope: str = "global"
    policy: str = "predicted"
    trace: str = ""
    link_gbps: float = 0.0


@dataclasses.dataclass(frozen=True)
class PrefetchConfig:
    """Which experts are copied before they are asked for.

    Attributes:
      predictor: "none" copies on demand only.
      horizon: layers ahead that the predictor scores, wrapping into the next token's first layers.
      checkpoint: directory of a trained predictor; empty: the one shipped for the shipped model.
    """

    predictor: str = "learned"
    horizon: int = 8
    checkpoint: str = ""


@dataclasses.dataclass(frozen=True)
class SpeculationConfig:
    """What the execution modes other than "exact" may depart from the true router in.

    Attributes:
      threshold: "hybrid" runs exactly the layers whose recall on validation text is below this share.
      bonus: "cache_aware" prefers an expert on the device to one whose router logit is at most this much higher.
    """

    threshold: float = 0.5
    bonus: float = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a loaded model depends on. The defaults are those of `configs/mixtral.py`.

    Attributes:
      checkpoint: a Hugging Face directory, or one that `convert.py` made of it; empty: the shipped model.
      execution: "exact" runs the experts that the true router chose, the others predicted ones, or ones that are
        already there: see `moe_jax.inference.execution`.
      dtype: of the computation and the dense weights on the device.
      max_seq_len: positions of the key/value cache per row; 0: as many as the model allows.
      prefill_chunk: tokens of a prompt that go through a layer at once.
      batch_size: most prompts that decode together.
    """

    checkpoint: str = ""
    offload: OffloadConfig = dataclasses.field(default_factory=OffloadConfig)
    prefetch: PrefetchConfig = dataclasses.field(default_factory=PrefetchConfig)
    execution: str = "exact"
    speculation: SpeculationConfig = dataclasses.field(default_factory=SpeculationConfig)
    dtype: str = "float32"
    max_seq_len: int = 0
    prefill_chunk: int = 256
    batch_size: int = 8

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """From a plain nested dictionary (a ConfigDict's `to_dict()`); fields not given keep their defaults.

        Raises:
          UserError: an unknown field, a value of the wrong type, out of range, or not among the accepted ones, or two
            that exclude each other.
        """
        config = _build(cls, values, "")
        if config.prefetch.predictor == "oracle" and config.execution != "exact":
            raise UserError(
                f"config.execution={config.execution!r}: the oracle knows what exact execution needs, and nothing of"
                " other modes; choose --config.execution=exact, or --config.prefetch.predictor=router"
            )
        return config


def _build(cls: type, values: Any, prefix: str) -> Any:
    if isinstance(values, cls):
        values = dataclasses.asdict(values)  # checked like any other
    if not isinstance(values, Mapping):
        raise UserError(f"config.{prefix.rstrip('.')} must be a group of fields, not {values!r}")
    hints = get_type_hints(cls)
    built = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"unknown config field {prefix}{name}{suggestion(str(name), hints)}")
        nested = dataclasses.is_dataclass(hints[name])
        check = _build if nested else _check
        built[name] = check(hints[name], value, f"{prefix}{name}" + ("." if nested else ""))
    return cls(**built)


def _check(kind: type, value: Any, field: str) -> Any:
    """The value of one field, of type `kind` (an integer is also a float)."""
    assert not get_args(kind), f"{field}: only plain types are checked"
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"config.{field} must be of type {kind.__name__}, not {value!r}")
    if field in _CHOICES and value not in _CHOICES[field]:
        accepted = _CHOICES[field]
        raise UserError(f"config.{field}={value!r} is not one of {', '.join(accepted)}{suggestion(value, accepted)}")
    if field in _AT_LEAST and not (value >= _AT_LEAST[field] and math.isfinite(value)):
        raise UserError(f"config.{field} must be at least {_AT_LEAST[field]}, not {value}")
    if field in _AT_MOST and value > _AT_MOST[field]:
        raise UserError(f"config.{field} must be at most {_AT_MOST[field]}, not {value}")
    return value


def suggestion(word: str, known: Any) -> str:
    """`; did you mean X?` when a known word is near, otherwise the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def choices(field: str) -> tuple[str, ...]:
    """What a field accepts, for instance "offload.policy"."""
    return tuple(_CHOICES[field])

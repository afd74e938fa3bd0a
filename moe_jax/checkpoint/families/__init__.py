"""Model families: each file reads a `config.json` into an `Architecture` and says how the weights are named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from moe_jax.checkpoint.families import deepseek, gpt_oss, mixtral, olmoe, qwen2_moe, qwen3_moe
from moe_jax.checkpoint.names import Names
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture


class Family(Protocol):
    """What a family's module offers."""

    def read_config(self, config: Mapping[str, Any]) -> Architecture:
        """Raises UserError, naming the field, for everything that is not implemented."""
        ...

    def layouts(self, a: Architecture) -> tuple[Names, ...]:
        """The ways in which checkpoints of this family name and fuse their tensors, the usual one first."""
        ...


FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "gpt_oss": gpt_oss,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
}
"""By `model_type` of config.json."""


def family(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
      UserError: there is none.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"config.json has model_type {model_type!r}; supported: {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[model_type]

"""What a decoder looks like: one frozen dataclass, read from a Hugging Face `config.json`.

Dims legend (used in names, einsums and annotations everywhere):
B batch, T tokens, S cached positions, D model, N query heads, G key/value heads, H head width,
L layers, E experts, K active experts per token, F expert hidden, V vocabulary, R token rows (B * T flattened).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and constants of a Mixtral-architecture decoder. Hashable, so it can be a static jit argument."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_ff: int
    max_seq_len: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays of one expert, `[out, in]` as in the checkpoint: gate and up stacked, and down."""
        return {"gate_up": (2 * self.expert_ff, self.d_model), "down": (self.d_model, self.expert_ff)}

    def expert_params(self) -> int:
        """Number of parameters of one expert."""
        return 3 * self.expert_ff * self.d_model

    def active_params(self) -> int:
        """Parameters multiplied per decoded token: attention, router, K experts and the output head."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.d_model
        per_layer = attention + self.num_experts * self.d_model + self.top_k * self.expert_params()
        return self.num_layers * per_layer + self.vocab_size * self.d_model


# Fields of a Mixtral config.json that change the mathematics, with the only values this code implements.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "rope_scaling": (None,),
}


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)


def from_hf_config(config: Mapping[str, Any]) -> Architecture:
    """Reads the dictionary of a Hugging Face `config.json`.

    Raises:
      UserError: the model type, or a setting that changes the result, is not implemented.
    """
    model_type = config.get("model_type")
    if model_type != "mixtral":
        raise UserError(f"config.json has model_type {model_type!r}; supported: 'mixtral'")
    for field, allowed in _REQUIRED_VALUES.items():
        if config.get(field, allowed[0]) not in allowed:
            raise UserError(f"config.json asks for {field}={config[field]!r}; supported: {list(allowed)}")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"config.json asks for rope_type={rope['rope_type']!r}; supported: 'default'")
    bos = _ids(config.get("bos_token_id"))
    try:
        heads, d_model = config["num_attention_heads"], config["hidden_size"]
        architecture = Architecture(
            vocab_size=config["vocab_size"],
            d_model=d_model,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or d_model // heads,
            num_experts=config["num_local_experts"],
            top_k=config["num_experts_per_tok"],
            expert_ff=config["intermediate_size"],
            max_seq_len=config["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 1e6),
            norm_eps=config.get("rms_norm_eps", 1e-5),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_id=bos[0] if bos else None,
            eos_ids=_ids(config.get("eos_token_id")),
        )
    except KeyError as error:
        raise UserError(f"config.json has no field {error}; a Mixtral configuration needs it") from None
    if architecture.top_k > architecture.num_experts or architecture.num_heads % architecture.num_kv_heads:
        raise UserError(
            f"config.json is inconsistent: {architecture.top_k} of {architecture.num_experts} experts,"
            f" {architecture.num_heads} query heads over {architecture.num_kv_heads} key/value heads"
        )
    return architecture


def to_hf_config(a: Architecture, dtype: str) -> dict[str, Any]:
    """The `config.json` that `transformers` reads as the same model (inverse of `from_hf_config`)."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": a.vocab_size,
        "hidden_size": a.d_model,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "num_local_experts": a.num_experts,
        "num_experts_per_tok": a.top_k,
        "intermediate_size": a.expert_ff,
        "max_position_embeddings": a.max_seq_len,
        "rope_theta": a.rope_theta,
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tie_embeddings,
        "hidden_act": "silu",
        "sliding_window": None,
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "bos_token_id": a.bos_id,
        "eos_token_id": a.eos_ids[0] if len(a.eos_ids) == 1 else list(a.eos_ids),
        "torch_dtype": dtype,
    }

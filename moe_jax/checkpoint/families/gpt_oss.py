"""GPT-OSS (arXiv 2508.10925): attention sinks, alternating sliding windows, biases everywhere, experts in MXFP4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.checkpoint.config_reader import ConfigReader
from moe_jax.checkpoint.names import Names, Piece, Rows, dense
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture, ClampedSwiGLU, Experts, GroupedQuery, LayerKind, Routing
from moe_jax.model.rope import Yarn

BLOCK = 32
"""Inputs that share a scale in MXFP4."""

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The dictionary of a GPT-OSS `config.json`."""
    c = ConfigReader(config)
    c.require("hidden_act", "silu", default="silu")  # as released; the experts clamp it
    max_seq_len, count = c.size("max_position_embeddings", 131072), c.size("num_hidden_layers")
    bias = c.flag("attention_bias", True)
    sliding = c.sliding_layers([i % 2 == 0 for i in range(count)])
    window = c.size("sliding_window", 128)
    a = Architecture(
        vocab_size=c.size("vocab_size"),
        d_model=c.size("hidden_size"),
        layers=tuple(LayerKind(window if slides else None) for slides in sliding),
        attention=GroupedQuery(
            c.size("num_attention_heads"),
            c.size("num_key_value_heads"),
            c.size("head_dim", 64),
            qkv_bias=bias,
            out_bias=bias,
            sinks=True,
        ),
        rope=c.rope(max_seq_len, default_theta=150000.0, rope_scaling=_YARN),
        routing=Routing(
            c.size(c.named("num_experts_per_tok", "experts_per_token")), scoring="softmax_chosen", bias=True
        ),
        experts=Experts(
            c.size(c.named("num_local_experts", "num_experts")),
            c.size("intermediate_size"),
            ClampedSwiGLU(c.number("swiglu_limit", 7.0), c.number("swiglu_alpha", 1.702)),
            bias=True,
        ),
        max_seq_len=max_seq_len,
        norm_eps=c.number("rms_norm_eps", 1e-5),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        **c.special_tokens(),
    )
    if isinstance(a.rope.scaling, Yarn):  # the released files name it twice
        c.require("initial_context_length", a.rope.scaling.original_length, default=a.rope.scaling.original_length)
    _check_quantization(c, a)
    return c.finish(a)


def _check_quantization(c: ConfigReader, a: Architecture) -> None:
    """Which tensors are quantised, their names say."""
    quantization = c.mapping("quantization_config")
    if not quantization:
        return
    if (method := quantization.pop("quant_method", None)) != "mxfp4":
        raise UserError(f"config.json asks for quantization_config.quant_method={method!r}; supported: 'mxfp4'")
    quantization.pop("modules_to_not_convert", None)
    if left := {name: value for name, value in quantization.items() if value}:
        raise UserError(f"config.json has quantization_config with unsupported fields {left}")
    if a.d_model % BLOCK or a.experts.ff % BLOCK:
        raise UserError(
            f"config.json has hidden_size={a.d_model} and intermediate_size={a.experts.ff}; MXFP4 needs multiples of"
            f" {BLOCK}"
        )


def layouts(a: Architecture) -> tuple[Names, ...]:
    """Released: MXFP4 blocks and their scales. Plain: what `transformers` holds in memory, matrices transposed."""
    arrays = dense(a, router="mlp.router")
    return Names(arrays, _experts(a, _mxfp4)), Names(arrays, _experts(a, _transposed))


def _experts(
    a: Architecture, matrix: Callable[[str, int, int, int, int], dict[str, Rows]]
) -> Callable[[int, int], dict[str, Rows]]:
    f, d, E = a.experts.ff, a.d_model, a.num_experts

    def expert(layer: int, e: int) -> dict[str, Rows]:
        parts: dict[str, Rows] = {}
        for field, out, width in (("gate_up", 2 * f, d), ("down", d, f)):
            name = f"model.layers.{a.moe_layers[layer]}.mlp.experts.{field}_proj"
            parts |= {field + part: rows for part, rows in matrix(name, E, out, width, e).items()}
            parts[f"{field}_bias"] = (Piece(f"{name}_bias", (E, out), e),)
        return parts

    return expert


def _mxfp4(name: str, E: int, out: int, width: int, e: int) -> dict[str, Rows]:
    blocks = Piece(f"{name}_blocks", (E, out, width // BLOCK, BLOCK // 2), e, dtype="U8")
    return {".blocks": (blocks,), ".scales": (Piece(f"{name}_scales", (E, out, width // BLOCK), e, dtype="U8"),)}


def _transposed(name: str, E: int, out: int, width: int, e: int) -> dict[str, Rows]:
    return {"": (Piece(name, (E, width, out), e, transposed=True),)}

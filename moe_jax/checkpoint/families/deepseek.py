"""DeepSeek-V2 (arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437): latent attention, shared experts, first layers
dense, routing limited to groups of experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.checkpoint import fp8
from moe_jax.checkpoint.config_reader import ConfigReader
from moe_jax.checkpoint.names import Names, Path, Rows, dense, fused_experts, per_expert, rows
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture, Experts, Latent, LayerKind, Routing, SharedExpert
from moe_jax.model.rope import Rope, Yarn

# Losses and parallelism of training.
_INERT = "aux_loss_alpha seq_aux ep_size pretraining_tp"
# What transformers takes for fields that are absent; null means none.
_ABSENT_V2 = {"n_shared_experts": 2, "q_lora_rank": 1536}
_ABSENT_V3 = {
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "q_lora_rank": 1536,
}


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The dictionary of a DeepSeek-V2 or -V3 `config.json`."""
    v3 = config["model_type"] == "deepseek_v3"
    config = {**(_ABSENT_V3 if v3 else _ABSENT_V2), **config}
    return _read_v3(config) if v3 else _read_v2(config)


def _read_v2(config: Mapping[str, Any]) -> Architecture:
    c = ConfigReader(config)
    c.require("scoring_func", "softmax", default="softmax")
    c.require("rope_interleave", True, default=True)
    c.require("mlp_bias", False, default=False)
    # Renormalised gates: its first implementation leaves out routed_scaling_factor then, transformers ignores the
    # field. No released model has them.
    c.require("norm_topk_prob", False, default=False)
    groups = _groups(c)  # read in any case: greedy routing ignores them
    limited = c.require("topk_method", "greedy", "group_limited_greedy", default="greedy") != "greedy"
    return _read(c, config, Routing(c.size("num_experts_per_tok"), renormalise=False, **(groups if limited else {})))


def _read_v3(config: Mapping[str, Any]) -> Architecture:
    c = ConfigReader(config)
    c.require("scoring_func", "sigmoid", default="sigmoid")
    c.require("topk_method", "noaux_tc", default="noaux_tc")
    c.get(c.named("num_nextn_predict_layers", "num_mtp_layers"), None)  # see `_prediction_layer`
    routing = Routing(
        c.size("num_experts_per_tok"),
        scoring="sigmoid",
        renormalise=c.flag("norm_topk_prob", True),
        correction_bias=True,
        group_score="top2",
        **_groups(c),
    )
    a = _read(c, config, routing, c.flag("rope_interleave", True))
    if a.num_experts < 2 * routing.num_groups:
        raise UserError("config.json is inconsistent: groups of 1 expert, where two make a group's score")
    return a


def _groups(c: ConfigReader) -> dict[str, Any]:
    return {"num_groups": c.size("n_group", 1), "groups_kept": c.size("topk_group", 1)}


def _read(c: ConfigReader, config: Mapping[str, Any], routing: Routing, interleaved: bool = True) -> Architecture:
    """What both have in common."""
    for name in _INERT.split():
        c.get(name, None)
    c.require("hidden_act", "silu", default="silu")
    if quantization := c.mapping("quantization_config"):
        fp8.block_of(quantization)  # refuses what is not read
    max_seq_len = c.size("max_position_embeddings")
    rope = dataclasses.replace(c.rope(max_seq_len), interleaved=interleaved)
    attention = _attention(c, config, rope)
    moe_ff, shared = c.size("moe_intermediate_size"), c.size("n_shared_experts", 0, least=0)
    first, step = c.size("first_k_dense_replace", 0, least=0), c.size("moe_layer_freq", 1)
    dense_ff = c.size("intermediate_size")
    a = Architecture(
        vocab_size=c.size("vocab_size"),
        d_model=c.size("hidden_size"),
        layers=tuple(
            LayerKind(dense_ff=None if i >= first and i % step == 0 else dense_ff)
            for i in range(c.size("num_hidden_layers"))
        ),
        attention=attention,
        rope=rope,
        routing=dataclasses.replace(routing, scale=c.number("routed_scaling_factor", 1.0), float32=True),
        experts=Experts(c.size(c.named("n_routed_experts", "num_local_experts", "num_experts")), moe_ff),
        shared=SharedExpert(shared * moe_ff) if shared else None,  # several are one of their widths' sum
        max_seq_len=max_seq_len,
        norm_eps=c.number("rms_norm_eps", 1e-6),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        **c.special_tokens(),
    )
    return c.finish(a)


def _attention(c: ConfigReader, config: Mapping[str, Any], rope: Rope) -> Latent:
    heads, nope, turned = c.size("num_attention_heads"), c.size("qk_nope_head_dim"), c.size("qk_rope_head_dim")
    if (keys := c.size("num_key_value_heads", heads)) != heads:
        raise UserError(
            f"config.json is inconsistent: {heads} query heads over {keys} of keys; latent attention needs as many"
        )
    # transformers writes both of these; they follow from the others.
    c.require("head_dim", turned, default=turned)
    c.require("qk_head_dim", nope + turned, default=nope + turned)
    scale = (nope + turned) ** -0.5
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope.scaling, Yarn) and (mscale := scaling.get("mscale_all_dim")) and rope.scaling.factor > 1:
        scale *= (0.1 * mscale * math.log(rope.scaling.factor) + 1.0) ** 2
    return Latent(
        heads,
        kv_rank=c.size("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=turned,
        v_dim=c.size("v_head_dim"),
        score_scale=scale,
        q_rank=c.size("q_lora_rank", None),
        bias=c.flag("attention_bias", False),
    )


def _attention_names(a: Architecture, layer: int) -> dict[Path, Rows]:
    s, d = a.attention, a.d_model
    assert isinstance(s, Latent)
    prefix, path = f"model.layers.{layer}.self_attn", ("layers", layer, "attention")
    queries = s.num_heads * (s.nope_dim + s.rope_dim)
    arrays: dict[Path, tuple[str, tuple[int, ...]]] = {
        ("kv_down",): ("kv_a_proj_with_mqa.weight", (s.kv_rank + s.rope_dim, d)),
        ("kv_norm", "weight"): ("kv_a_layernorm.weight", (s.kv_rank,)),
        ("kv_up",): ("kv_b_proj.weight", (s.num_heads * (s.nope_dim + s.v_dim), s.kv_rank)),
        ("out",): ("o_proj.weight", (d, s.num_heads * s.v_dim)),
    }
    if s.q_rank is None:
        arrays["q_up",] = ("q_proj.weight", (queries, d))
    else:
        arrays["q_down",] = ("q_a_proj.weight", (s.q_rank, d))
        arrays["q_norm", "weight"] = ("q_a_layernorm.weight", (s.q_rank,))
        arrays["q_up",] = ("q_b_proj.weight", (queries, s.q_rank))
    if s.bias:
        arrays["kv_down_bias",] = ("kv_a_proj_with_mqa.bias", (s.kv_rank + s.rope_dim,))
        arrays["out_bias",] = ("o_proj.bias", (d,))
        if s.q_rank is not None:
            arrays["q_down_bias",] = ("q_a_proj.bias", (s.q_rank,))
    return {(*path, *own): rows((f"{prefix}.{name}", shape)) for own, (name, shape) in arrays.items()}


def _dense(a: Architecture) -> dict[Path, Rows]:
    return dense(a, attention=_attention_names, shared="mlp.shared_experts")


def layouts(a: Architecture) -> tuple[Names, ...]:
    """Released: three tensors per expert. Fused: what `transformers` 5 holds in memory."""
    return tuple(Names(_dense(a), e(a), unread=_prediction_layer(a)) for e in (per_expert, fused_experts))


def _prediction_layer(a: Architecture) -> tuple[frozenset[str], ...]:
    """Tensors of the layer past the last one, which predicts the token after the next (multi-token prediction, arXiv
    2412.19437, section 2.2): a layer with experts and its own norms; copies of embedding and output head may be there.
    """
    prefix = f"model.layers.{a.num_layers}."
    longer = dataclasses.replace(a, layers=(*a.layers, LayerKind()))
    last = per_expert(longer)
    arrays = [*_dense(longer).values(), *(r for e in range(a.num_experts) for r in last(a.num_moe_layers, e).values())]
    layer = {piece.name for pieces in arrays for piece in pieces if piece.name.startswith(prefix)}
    own = {f"{prefix}{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
    copies = [frozenset({f"{prefix}{name}.weight"}) for name in ("embed_tokens", "shared_head.head")]
    return frozenset(layer | own), *copies

"""Reads a Hugging Face `config.json` so that nothing in it is ignored: every field is read, known to change nothing in
inference, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture, GroupedQuery
from moe_jax.model.rope import Linear, Llama3, Rope, Yarn

# Fields of any model that do not change what it computes.
_INERT = """
    architectures model_type torch_dtype dtype transformers_version name_or_path auto_map use_cache pad_token_id
    initializer_range output_router_logits router_aux_loss_coef output_attentions output_hidden_states return_dict
    attention_dropout is_encoder_decoder is_decoder tokenizer_class use_return_dict chunk_size_feed_forward
    id2label label2id problem_type torchscript pruned_heads unsloth_fixed unsloth_version
"""
# Sampling settings that older versions of `transformers` kept here (now in generation_config.json).
_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens output_scores
"""
_MISSING: Any = object()


class ConfigReader:
    """One pass over a `config.json`: `get`, `require` and their kin mark fields as read; `finish` refuses the rest."""

    def __init__(self, config: Mapping[str, Any]):
        self._config, self._seen = config, {*_INERT.split(), *_GENERATION.split()}

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The field's value; `default` if it is absent or null.

        Raises:
          UserError: it is absent and has no default.
        """
        self._seen.add(name)
        value = self._config.get(name)
        if value is None:
            if default is _MISSING:
                raise UserError(f"config.json has no field '{name}'; a {self._config.get('model_type')} model needs it")
            return default
        return value

    def named(self, *names: str) -> str:
        """Under which of its names config.json holds a field; the first one if under none.

        Raises:
          UserError: it holds several, which differ.
        """
        self._seen |= set(names)
        given = {name: self._config[name] for name in names if self._config.get(name) is not None}
        if len(set(map(repr, given.values()))) > 1:
            raise UserError(f"config.json contradicts itself: {given}")
        return next(iter(given), names[0])

    def size(self, name: str, default: Any = _MISSING, least: int = 1) -> int:
        """A whole number of at least `least`; or the default, whatever it is."""
        value = self.get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"config.json has {name}={value!r}; it must be a whole number of at least {least}")
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A finite number; or the default, whatever it is."""
        value = self.get(name, default)
        if value is default:
            return value
        return _number(value, name)

    def flag(self, name: str, default: bool) -> bool:
        """True or false. Null is neither where absence means true: it would be false elsewhere."""
        value = self.get(name, None if default and name in self._config else default)
        if not isinstance(value, bool):
            raise UserError(f"config.json has {name}={value!r}; it must be true or false")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; absent or null: an empty one."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise UserError(f"config.json has {name}={value!r}; it must be an object")
        return dict(value)

    def require(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """A field with few supported values.

        Raises:
          UserError: it has another one.
        """
        value = self.get(name, default)
        if value not in allowed:
            raise UserError(f"config.json asks for {name}={value!r}; supported: {', '.join(map(repr, allowed))}")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """A whole number, a list of them, or null, which gives ()."""
        value = self.get(name, ())
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in values):
            raise UserError(f"config.json has {name}={value!r}; it must be a whole number or a list of them")
        return values

    def sliding_layers(self, default: Sequence[bool]) -> list[bool]:
        """Which layers see a sliding window: `layer_types`, or the default for as many layers."""
        names = {True: "sliding_attention", False: "full_attention"}
        types = self.get("layer_types", None)
        if types is None:
            return list(default)
        known = isinstance(types, list) and all(kind in names.values() for kind in types)
        if not known or len(types) != len(default):
            raise UserError(
                f"config.json asks for layer_types={types!r}; supported: {len(default)} of 'sliding_attention',"
                " 'full_attention'"
            )
        return [kind == names[True] for kind in types]

    def special_tokens(self) -> dict[str, Any]:
        """`bos_id` and `eos_ids` of an Architecture."""
        bos = self.ids("bos_token_id")
        return {"bos_id": bos[0] if bos else None, "eos_ids": self.ids("eos_token_id")}

    def rope(self, max_seq_len: int, default_theta: float = 10000.0, **defaults: Any) -> Rope:
        """Rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

        Raises:
          UserError: a type, or a field of it, that is not implemented; both are there, and differ.
        """
        given = {name: fields for name in ("rope_parameters", "rope_scaling") if (fields := self.mapping(name))}
        name = next(iter(given), "rope_parameters")
        if len({repr(sorted(_scaling(fields).items(), key=str)) for fields in given.values()}) > 1:
            raise UserError(f"config.json contradicts itself: {given}; leave one of the two")
        fields = given.get(name) or dict(defaults.get("rope_scaling") or {})
        old_theta = self.number("rope_theta", None)
        theta = _number(fields.pop("rope_theta", None) or old_theta or default_theta, "rope_theta")
        kind, old_kind = fields.pop("rope_type", None), fields.pop("type", None)
        kind = kind or old_kind or "default"
        for share in (fields.pop("partial_rotary_factor", None), self.get("partial_rotary_factor", None)):
            if share not in (None, 1.0):
                raise UserError(f"config.json asks for partial_rotary_factor={share!r}; supported: 1.0")
        take = lambda key, default=_MISSING: _field(fields, name, key, default)
        scaling = None
        # As in transformers: a field of config.json beats one of the rope parameters, and the context is the default.
        length = self.size("original_max_position_embeddings", None)
        if kind in ("yarn", "llama3"):
            length = int(length or take("original_max_position_embeddings", max_seq_len))
            fields.pop("original_max_position_embeddings", None)
        if kind == "linear":
            scaling = Linear(take("factor"))
        elif kind == "yarn":
            factor = take("factor", max_seq_len / length)
            scaling = Yarn(
                factor,
                length,
                beta_fast=take("beta_fast", None) or 32.0,
                beta_slow=take("beta_slow", None) or 1.0,
                truncate=bool(fields.pop("truncate", True)),
                attention_factor=_attention_factor(
                    factor, take("attention_factor", None), take("mscale", None), take("mscale_all_dim", None)
                ),
            )
        elif kind == "llama3":
            scaling = Llama3(take("factor"), length, take("low_freq_factor"), take("high_freq_factor"))
        elif kind != "default":
            raise UserError(
                f"config.json asks for rope_type={kind!r}; supported: 'default', 'linear', 'yarn', 'llama3'"
            )
        if left := {key: value for key, value in fields.items() if value is not None}:
            raise UserError(f"config.json has {name} of type {kind!r} with unsupported fields {left}")
        return Rope(theta, scaling)

    def finish(self, a: Architecture) -> Architecture:
        """Call when everything has been read; gives `a` back.

        Raises:
          UserError: a field that is none of the known ones asks for something, or the fields contradict each other.
        """
        unknown = {
            key: value
            for key, value in self._config.items()
            if key not in self._seen and not key.startswith("_") and value not in (None, False, "", [], {})
        }
        if unknown:
            fields = ", ".join(f"{key}={value!r}"[:80] for key, value in list(unknown.items())[:5])
            raise UserError(
                f"config.json has fields that moe_jax does not know: {fields}; remove what does not change the model"
            )
        r, contradictions = a.routing, []
        if isinstance(a.attention, GroupedQuery) and a.attention.num_heads % a.attention.num_kv_heads:
            contradictions.append(f"{a.attention.num_heads} query heads over {a.attention.num_kv_heads} of keys")
        if a.attention.rope_dim % 2:
            contradictions.append(f"a rotary width of {a.attention.rope_dim}, which is odd")
        if a.num_experts % r.num_groups or r.groups_kept > r.num_groups:
            contradictions.append(f"{r.groups_kept} of {r.num_groups} groups of {a.num_experts} experts")
        elif r.top_k > a.num_experts // r.num_groups * r.groups_kept:
            contradictions.append(f"{r.top_k} of {a.num_experts} experts")
        if not a.num_moe_layers:
            contradictions.append("no layer with experts")
        if contradictions:
            raise UserError(f"config.json is inconsistent: {'; '.join(contradictions)}")
        return a


def _scaling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What both of the places for rope parameters may say."""
    renamed = {"rope_type" if key == "type" else key: value for key, value in fields.items()}
    return {key: value for key, value in renamed.items() if key != "rope_theta" and value is not None}


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"config.json has {name}={value!r}; it must be a number")
    return float(value)


def _field(fields: dict[str, Any], where: str, key: str, default: Any) -> Any:
    value = fields.pop(key, None)
    if value is not None:
        return _number(value, f"{where}.{key}")
    if default is _MISSING:
        raise UserError(f"config.json has {where} without {key}")
    return default


def _attention_factor(factor: float, given: float | None, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What YaRN multiplies cosines and sines with (arXiv 2309.00071, section 3.4; the two scales are DeepSeek's)."""

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given is not None:
        return given
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)

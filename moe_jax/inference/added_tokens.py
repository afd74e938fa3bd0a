"""The tokens that the files beside a tokenizer declare: those beyond its vocabulary, and which are special.

As `transformers` reads them: `added_tokens_decoder` of tokenizer_config.json, else added_tokens.json; then the named
special tokens (`eos_token`, ...) and the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from moe_jax.errors import UserError

DECODER = "added_tokens_decoder"
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def named(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names: "bos_token", "eos_token", those of a model's own."""
    return {name: _token(entry).content for name, entry in _named(config).items()}


def add(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    added: Mapping[str, int],
    own: Mapping[int, AddedToken] | None = None,
) -> None:
    """Adds to a tokenizer what the files declare.

    Args:
      config: tokenizer_config.json.
      added: added_tokens.json: ids of tokens, used where `config` has no `added_tokens_decoder`.
      own: tokens by id that the vocabulary itself declares, where `backend` does not have them yet.

    Raises:
      UserError: a token gets another id than the files say, or they are damaged.
    """
    try:
        names = {token.content: token for token in map(_token, _named(config).values())}
        others = {token.content: token for token in map(_token, _others(config))}
        if DECODER in config:
            stated = {int(id): _token(entry, special=False) for id, entry in (config[DECODER] or {}).items()}
        else:
            stated = {int(id): _token(text, special=text in names or text in others) for text, id in added.items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(
            "the special or added tokens in tokenizer_config.json or beside it are damaged; download all files of the"
            " tokenizer again"
        ) from None
    before = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    tokens = [token for _, token in sorted({**(own or {}), **stated}.items())]
    known = {**before, **{token.content: token for token in tokens}}
    tokens += [known.get(text, token) for text, token in names.items()]
    tokens += [token for text, token in others.items() if text not in known]
    for token in tokens:
        # Once special is always special to the backend, whatever is declared later.
        token.special |= token.content in names or (token.content in before and before[token.content].special)
    backend.add_tokens(tokens)
    for id, token in sorted(stated.items()):
        if (got := backend.token_to_id(token.content)) != id:
            file = "tokenizer_config.json" if DECODER in config else "added_tokens.json"
            raise UserError(
                f"{file} gives {token.content!r} the id {id}, where {got} comes next; download all files of the"
                " tokenizer again"
            )


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    names = [*_NAMES, *(key for key in config if key.endswith("_token") and key not in _NAMES)]
    entries = {name: entry for name in names if isinstance(entry := config.get(name), str) or _described(entry)}
    extra = config.get("extra_special_tokens")
    return entries | extra if isinstance(extra, dict) else entries


def _others(config: Mapping[str, Any]) -> list[Any]:
    lists = (config.get(key) for key in ("extra_special_tokens", "additional_special_tokens"))
    return next((entries for entries in lists if entries and isinstance(entries, list)), [])


def _described(entry: Any) -> bool:
    return isinstance(entry, dict) and "content" in entry


def _token(entry: Any, special: bool = True) -> AddedToken:
    """A token as the files have it: its text, or what is to be known of it."""
    if isinstance(entry, str):
        entry = {"content": entry}
    options = {name: entry[name] for name in ("lstrip", "rstrip", "single_word") if name in entry}
    return AddedToken(
        entry["content"], special=entry.get("special", special), normalized=entry.get("normalized", False), **options
    )

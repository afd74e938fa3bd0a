"""Text in and out: the checkpoint's tokenizer, streaming that never shows half a character, chat templates."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_jax.checkpoint.hf import read_json, reading
from moe_jax.errors import UserError
from moe_jax.inference import added_tokens, sentencepiece

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      prefix: ids put before every prompt: the bos token, or nothing.
    """

    def __init__(self, directory: str | Path):
        """Reads tokenizer.json, else tokenizer.model, and the configuration beside it where it exists.

        Raises:
          UserError: there is neither, or one of the files is damaged or cannot be read.
        """
        self.directory = directory = Path(directory)
        self._config = read_json(directory / "tokenizer_config.json") or {}
        added = {}
        if added_tokens.DECODER not in self._config:  # where it is, `transformers` reads no other file
            self._config |= read_json(directory / "special_tokens_map.json") or {}
            added = read_json(directory / "added_tokens.json") or {}
        file, old = directory / "tokenizer.json", directory / "tokenizer.model"
        if file.is_file():
            try:
                self.backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the package raises plain Exception
                raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}); download it again") from None
            added_tokens.add(self.backend, self._config, added)
        elif old.is_file():
            with reading(old):
                model = sentencepiece.read_model(old)
            self._config = {"add_bos_token": True, **model.special, **self._config}
            self.backend = sentencepiece.build(model, self._config, added)
        else:
            raise UserError(
                f"{directory} has no tokenizer.json and no tokenizer.model; write one there with"
                " transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        # A prompt is never cut or filled up, whatever the tokenizer was trained with.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.prefix = self._find_prefix(read_json(directory / "config.json") or {})
        self._special = {id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}
        self._byte_fallback = '"ByteFallback"' in json.dumps(json.loads(self.backend.to_str())["decoder"])

    def encode(self, text: str) -> list[int]:
        """Token ids, with bos once in front if the checkpoint wants it, and no eos.

        Special tokens written in the text are recognised, as in `transformers`; a bos written there is the only one.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return ids if ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def apply_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer. The template alone says where bos goes.

        Args:
          messages: each with `role` ("system", "user" or "assistant") and `content`.

        Raises:
          UserError: the checkpoint has no chat template, or the template refuses these messages.
        """
        return self.backend.encode(self.render_chat(messages), add_special_tokens=False).ids

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text that `apply_chat` encodes; without a generation prompt, no answer is begun."""
        template = self.chat_template()
        # A template is code from the checkpoint: it runs in a sandbox, with the few functions that templates expect.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        # Tools and documents, which there are none of, are not undefined but none, as in `transformers`.
        given = {**added_tokens.named(self._config), "messages": messages, "tools": None, "documents": None}
        try:
            return environment.from_string(template).render(given, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # it is code: it may divide by zero, or call itself for ever
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the chat template of {self.directory} refuses these messages: {reason}") from None

    def chat_template(self) -> str:
        """The template's source."""
        file = self.directory / "chat_template.jinja"
        if file.is_file():
            with reading(file):
                return file.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        if not isinstance(template, str):
            raise UserError(
                f"checkpoint {self.directory} has no chat template; leave out --chat (lm_eval:"
                " --apply_chat_template), or use a chat model"
            )
        return template

    def _token(self, name: str) -> str | None:
        """A special token by its name in tokenizer_config.json, where it is a string or holds one."""
        token = self._config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def _find_prefix(self, config: dict[str, Any]) -> list[int]:
        bos_token = self._token("bos_token")
        bos = self.backend.token_to_id(bos_token) if bos_token else config.get("bos_token_id")
        if "add_bos_token" in self._config:
            return [bos] if self._config["add_bos_token"] and bos is not None else []
        # Otherwise the post-processor of tokenizer.json decides; what it puts around nothing stands before a text,
        # but for an eos, after which no model would go on.
        eos_token, eos = self._token("eos_token"), config.get("eos_token_id")
        ends = {*(eos if isinstance(eos, list) else [eos]), self.backend.token_to_id(eos_token) if eos_token else None}
        return [id for id in self.backend.encode("").ids if id not in ends or id == bos]


class StreamDecoder:
    """Turns ids into text one at a time: the pieces and the flush, joined, are exactly `decode` of all ids.

    Text is held back while later ids could still change it: half a character, or bytes that may become one. So U+FFFD
    comes out only where the whole text has it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Decoders treat the first token in their own way (a leading space is dropped), so that the ids last shown
        # stay in front of those still held back.
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, id: int) -> str:
        """The text that is certain once `id` is known; often one token's, sometimes nothing."""
        tokenizer = self._tokenizer
        token = tokenizer.backend.id_to_token(id)
        if token is None or id in tokenizer._special:
            return ""  # decoding leaves it out, and what stands on both sides of it may be one character
        self._held.append(id)
        # Byte tokens are decoded run by run: one more can turn a whole run into U+FFFD.
        open_run = tokenizer._byte_fallback and _BYTE_TOKEN.fullmatch(token)
        return "" if open_run else self._settle(final=False)

    def flush(self) -> str:
        """What was still held back; afterwards the decoder is as new."""
        piece = self._settle(final=True)
        self._shown = []
        return piece

    def _settle(self, final: bool) -> str:
        decode = self._tokenizer.decode
        before, after = decode(self._shown), decode(self._shown + self._held)
        if not final and (after == before or after.endswith(REPLACEMENT)):
            return ""
        self._shown, self._held = self._held, []
        return after[len(before) :]


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what the assistant says, for training; it is there to be read."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML. These arguments are those of `transformers`, in its order.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)

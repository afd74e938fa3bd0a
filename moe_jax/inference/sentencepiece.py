"""Reads a SentencePiece `tokenizer.model` into a `tokenizers.Tokenizer` that gives the same ids.

Checkpoints of the first Mixtrals (and what was made from them) have no tokenizer.json. Their models are byte-pair
encodings with byte fallback; what such a model could be besides is refused by name. The file is a protocol buffer,
sentencepiece_model.proto in https://github.com/google/sentencepiece, of which a few fields matter here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from moe_jax.errors import UserError
from moe_jax.inference import added_tokens

SPACE = "\u2581"  # stands for a space in pieces
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE, _KINDS = 2, {1: "unigram", 3: "word", 4: "char"}
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of the model
_HOW_TO = (
    "write a tokenizer.json there with transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...), where"
    " transformers and sentencepiece are installed"
)


class Piece(NamedTuple):
    """An entry of the vocabulary; its place is its id."""

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What is used of a SentencePiece model."""

    pieces: list[Piece]
    prefix: bool  # a space is put in front of every text
    special: dict[str, str]  # its special tokens, as tokenizer_config.json would name them: "bos_token", ...


def read_model(file: Path) -> Model:
    """Reads `tokenizer.model`.

    Raises:
      UserError: it is damaged, or of a kind that is not supported.
    """
    try:
        fields = list(_fields(file.read_bytes()))
        pieces = [_piece(data) for number, data in fields if number == _PIECES]
        trainer, normalizer = (
            {key: x for number, data in fields if number == wanted for key, x in _fields(data)}
            for wanted in (_TRAINER, _NORMALIZER)
        )
    except (ValueError, IndexError, struct.error, TypeError):
        raise UserError(f"{file} is not a SentencePiece model, or damaged; download it again") from None
    if not pieces:
        raise UserError(f"{file} is not a SentencePiece model, or damaged; download it again")
    kind = trainer.get(3, 1)
    # Numbers of the fields of TrainerSpec and NormalizerSpec, with their defaults.
    unsupported = {
        f"model_type={_KINDS.get(kind, kind)}": kind != _BPE,
        "treat_whitespace_as_suffix": trainer.get(24, 0),
        "byte_fallback=false": not trainer.get(35, 0),
        "precompiled_charsmap": normalizer.get(2, b""),
        "remove_extra_whitespaces": normalizer.get(4, 1),
        "escape_whitespaces=false": not normalizer.get(5, 1),
    }
    if found := [name for name, there in unsupported.items() if there]:
        raise UserError(f"{file} asks for {', '.join(found)}, which moe_jax does not support; {_HOW_TO}")
    ids = {"unk_token": trainer.get(40, 0), "bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2)}
    return Model(
        pieces,
        prefix=bool(normalizer.get(3, 1)),
        special={name: pieces[id].text for name, id in ids.items() if id < len(pieces)},  # -1 is a very large number
    )


def build(model: Model, config: Mapping[str, Any], added: Mapping[str, int]) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint; it puts no bos in front.

    Args:
      config: tokenizer_config.json, for `legacy` and the tokens it declares.
      added: added_tokens.json: ids of tokens beyond the model's.

    Raises:
      UserError: the ids of added tokens do not follow those of the model, or they are damaged.
    """
    vocabulary = {piece.text: id for id, piece in enumerate(model.pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            _merges(model.pieces),
            unk_token=model.special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    # Tokenizers put a space in front of what follows a special token ("legacy", as the first Mixtrals do and as
    # SentencePiece itself would, given the stretches between), or only in front of the whole.
    if config.get("legacy") is not False:
        prepend = [normalizers.Prepend(SPACE)] if model.prefix else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    else:
        scheme = "first" if model.prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    tokens = {
        id: AddedToken(piece.text, normalized=False, special=piece.kind != _USER_DEFINED)
        for id, piece in enumerate(model.pieces)
        if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    added_tokens.add(backend, config, added, own=tokens)
    return backend


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Pairs in the order in which they are joined.

    SentencePiece joins whatever makes the piece of highest score, the leftmost among equals. Of equal scores (runs of
    spaces, which were put in by hand) a longer left half comes first here: it is the leftmost, and goes on growing.
    """
    joined = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    parts = joined.keys() | {piece.text for piece in pieces if piece.kind == _USER_DEFINED}
    found = []
    for text, score in joined.items():
        for at in range(1, len(text)):
            if text[:at] in parts and text[at:] in parts:
                found.append((-score, -at, text[:at], text[at:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields[1].decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, _NORMAL)
    if not isinstance(kind, int):
        raise ValueError(kind)
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protocol buffer's message: whole numbers (unsigned), or bytes."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _number(data, at)
        elif kind in (1, 2, 5):
            size, at = _number(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("cut")
        else:
            raise ValueError(kind)
        yield tag >> 3, value


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at

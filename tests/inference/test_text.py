"""Tokenizer, streaming and chat templates, over every kind of decoder that checkpoints use."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from moe_jax.errors import UserError
from moe_jax.inference.text import REPLACEMENT, StreamDecoder, Tokenizer

SPECIAL = ["<s>", "</s>", "<pad>"]
TEXT = ["def f(x):\n    return x  # naïve café", "日本語 €5 🙂🙂", "In the beginning God created the heaven."] * 5


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def byte_fallback(prefix_decoder: bool = True) -> Backend:
    """As Llama and Mixtral: pieces with U+2581 for a space, and bytes for what is not in the vocabulary."""
    words = ["▁", "▁a", "a", "b", "c", "▁the", "é", "▁▁", REPLACEMENT, "\n", ""]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "▁")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token=None, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_decoder else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(SPECIAL)
    return backend


def metaspace() -> Backend:
    pieces = [*SPECIAL, "▁", "▁a", "a", "▁b", "▁▁"]
    backend = Backend(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="a"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(SPECIAL)
    return backend


def word_piece() -> Backend:
    pieces = [*SPECIAL, "a", "##b", "c", ".", "'", "##'s", "n", "'t"]
    backend = Backend(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(SPECIAL)
    return backend


def no_decoder() -> Backend:
    pieces = [*SPECIAL, "a", "b", " ", ""]
    return Backend(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="a"))


BACKENDS = {f.__name__: f for f in (byte_level, byte_fallback, metaspace, word_piece, no_decoder)}


def opened(directory, backend: Backend, config=None, tokenizer_config=None) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    for name, value in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        if value is not None:
            (directory / name).write_text(json.dumps(value))
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {name: opened(tmp_path_factory.mktemp(name), make()) for name, make in BACKENDS.items()}


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_whole_for_any_ids(made, name, data):
    tokenizer = made[name]
    size = tokenizer.backend.get_vocab_size()
    some = st.integers(0, size + 2)  # a model's vocabulary is often padded beyond the tokenizer's
    if name == "byte_fallback":  # mostly words, and bytes that nearly make characters
        some = st.one_of(some, st.integers(3 + 256, size), st.sampled_from([3 + byte for byte in "€é🙂".encode()]))
    check_stream(tokenizer, data.draw(st.lists(some, max_size=40)))


def test_pieces_join_to_the_whole_exhaustively(made):
    """Every order of few tokens: an empty one and special ones between words, bytes that are characters or halves."""
    tokenizer = made["byte_fallback"]
    tokens = ["a", "▁a", "▁", "", "<0x41>", "<0xC3>", "<0xA9>", "</s>"]
    some = [tokenizer.backend.token_to_id(token) for token in tokens]
    for length in range(1, 5):
        for ids in itertools.product(some, repeat=length):
            check_stream(tokenizer, ids)


def check_stream(tokenizer: Tokenizer, ids) -> None:
    stream = StreamDecoder(tokenizer)
    whole, shown = tokenizer.decode(ids), ""
    for i in ids:
        shown += stream.push(i)
        assert whole.startswith(shown)
    assert shown + stream.flush() == whole
    assert stream.flush() == ""


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT + "▁")))
@settings(max_examples=200, deadline=None)
def test_text_never_shows_half_a_character(made, name, text):
    tokenizer = made[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("<s>", "").replace("</s>", "").replace("<pad>", "")
    stream = StreamDecoder(tokenizer)
    pieces = [*map(stream.push, ids), stream.flush()]
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_text_is_shown_as_soon_as_it_is_certain(made):
    stream = StreamDecoder(made["byte_level"])
    pieces = [stream.push(i) for i in made["byte_level"].encode("a€b")[1:]]
    assert [piece for piece in pieces if piece] == ["a", "€", "b"]
    assert stream.flush() == ""


def test_a_replacement_character_that_is_meant_comes_through(made):
    for name in ("byte_level", "byte_fallback"):
        stream = StreamDecoder(made[name])
        pieces = [*map(stream.push, made[name].encode(f"a{REPLACEMENT}b")), stream.flush()]
        assert "".join(pieces) == f"a{REPLACEMENT}b"


def test_special_tokens_may_stand_inside_a_character(made):
    euro = [3 + byte for byte in "€".encode()]
    stream = StreamDecoder(made["byte_fallback"])
    assert "".join(map(stream.push, [euro[0], 1, euro[1], 0, euro[2]])) + stream.flush() == "€"


@pytest.mark.parametrize(
    "post_processor, tokenizer_config, prefix",
    [
        ("<s> $A", None, [0]),
        ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, [0]),
        ("$A </s>", {"eos_token": "</s>"}, []),
        ("$A", {"bos_token": "<s>"}, []),
        ("$A", {"bos_token": "<s>", "add_bos_token": True}, [0]),
        ("$A", {"bos_token": {"content": "<s>", "lstrip": False}, "add_bos_token": True}, [0]),
        ("$A", {"add_bos_token": True}, [0]),
        ("<s> $A", {"bos_token": "<s>", "add_bos_token": False}, []),
    ],
)
def test_bos_exactly_once(tmp_path, post_processor, tokenizer_config, prefix):
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single=post_processor, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = opened(tmp_path, backend, {"bos_token_id": 0, "eos_token_id": [1]}, tokenizer_config)
    ids = tokenizer.encode("ab")
    assert ids == [*prefix, *tokenizer.encode("<s>ab")[1:]]
    assert tokenizer.encode("<s>ab") == [0, *ids[len(prefix) :]]
    assert tokenizer.decode(ids) == "ab"


def test_a_prompt_is_neither_cut_nor_padded(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = opened(tmp_path, backend)
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0]
    assert len(tokenizer.encode("a")) == 2


END = "<|im_end|>"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
LATE = {"content": END, "special": True, **FLAGS}
DECODER = {"325": LATE}  # byte_level has 325 tokens


@pytest.mark.parametrize(
    "files, text",
    [
        ({"tokenizer_config": {"added_tokens_decoder": DECODER}}, "ab"),
        ({"tokenizer_config": {"added_tokens_decoder": {"325": {**LATE, "special": False}}}}, "a<|im_end|>b"),
        ({"tokenizer_config": {"added_tokens_decoder": {"325": {**LATE, "special": False}}, "eos_token": END}}, "ab"),
        ({"tokenizer_config": {"added_tokens_decoder": {"325": {**LATE, "lstrip": True}}}}, "ab"),
        ({"tokenizer_config": {"eos_token": END}}, "ab"),
        ({"tokenizer_config": {"eos_token": {"__type": "AddedToken", **LATE}}}, "ab"),
        ({"tokenizer_config": {"image_token": END}}, "ab"),
        ({"tokenizer_config": {"additional_special_tokens": [END]}}, "ab"),
        ({"tokenizer_config": {"extra_special_tokens": [END]}}, "ab"),
        ({"tokenizer_config": {"extra_special_tokens": {"image_token": END}}}, "ab"),
        ({"special_tokens_map": {"eos_token": LATE}}, "ab"),
        ({"special_tokens_map": {"eos_token": END}, "tokenizer_config": {"eos_token": "</s>"}}, "ab"),
        ({"special_tokens_map": {"additional_special_tokens": [END]}}, "ab"),
        ({"added_tokens": {END: 325}}, "a<|im_end|>b"),
        ({"added_tokens": {END: 325}, "special_tokens_map": {"eos_token": END}}, "ab"),
        ({"added_tokens": {END: 325, "<x>": 326}, "tokenizer_config": {"added_tokens_decoder": DECODER}}, "ab"),
    ],
)
def test_tokens_that_only_other_files_declare(tmp_path, files, text):
    """One id each, as in transformers, and left out of a text where they are special."""
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **files.get("tokenizer_config", {})}
    tokenizer = opened(tmp_path, byte_level(), tokenizer_config=config)
    ids = tokenizer.encode(f"a{END}b")
    assert ids.count(325) == 1 and tokenizer.decode(ids) == text
    check_stream(tokenizer, [*ids, 325, 326])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (f"a{END}b", f"a {END} b</s><x>"):
        ids = theirs(prompt).input_ids
        assert tokenizer.encode(prompt) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("declared", [{"eos_token": END}, {"additional_special_tokens": [END]}, {}])
@pytest.mark.parametrize("stated", [True, False, None])
def test_special_is_what_is_special_in_transformers(tmp_path, special, declared, stated):
    """A token of tokenizer.json that tokenizer_config.json names, or states to be special or not."""
    transformers = pytest.importorskip("transformers")
    backend = byte_level()
    backend.add_tokens([AddedToken(END, special=special, normalized=False)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **declared}
    if stated is not None:
        config["added_tokens_decoder"] = {"325": {**LATE, "special": stated}}
    tokenizer = opened(tmp_path, backend, tokenizer_config=config)
    ids = tokenizer.encode(f"a{END}b")
    assert ids[-2] == 325
    assert tokenizer.decode(ids) == transformers.AutoTokenizer.from_pretrained(tmp_path).decode(
        ids, skip_special_tokens=True
    )
    check_stream(tokenizer, [*tokenizer.encode("€")[:-1], 325, *tokenizer.encode("€")[-1:]])


@pytest.mark.parametrize(
    "name, value, part",
    [
        ("tokenizer_config", {"added_tokens_decoder": {"326": LATE}}, "gives '<|im_end|>' the id 326, where 325 comes"),
        ("tokenizer_config", {"added_tokens_decoder": {"7": LATE}}, "tokenizer_config.json gives '<|im_end|>' the id"),
        ("added_tokens", {END: 400}, "added_tokens.json gives '<|im_end|>' the id 400, where 325 comes next"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": LATE}}, "are damaged"),
        ("tokenizer_config", {"added_tokens_decoder": {"325": END.split()}}, "are damaged"),
        ("tokenizer_config", {"added_tokens_decoder": [LATE]}, "are damaged"),
        ("tokenizer_config", {"additional_special_tokens": [5]}, "are damaged"),
        ("special_tokens_map", {"eos_token": {"content": 5}}, "are damaged"),
        ("added_tokens", {END: None}, "are damaged"),
    ],
)
def test_declared_tokens_that_cannot_be(tmp_path, name, value, part):
    (tmp_path / f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(UserError) as caught:
        opened(tmp_path, byte_level())
    assert part in str(caught.value) and "\n" not in str(caught.value) and "download" in str(caught.value)


TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}
[{{ m.role }}] {{ m.content | tojson }}
  {% if loop.last %}{% break %}{% endif %}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{{ eos_token }}"""
MESSAGES = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "naïve?"}]


@pytest.mark.parametrize("where", ["file", "config", "list"])
def test_chat_equals_transformers(tmp_path, where):
    transformers = pytest.importorskip("transformers")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if where == "config":
        config["chat_template"] = TEMPLATE
    elif where == "list":
        config["chat_template"] = [{"name": "default", "template": TEMPLATE}, {"name": "tool", "template": "x"}]
    else:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = opened(tmp_path, byte_level(), tokenizer_config=config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(MESSAGES) == text
    assert "<b>" in text and "naïve" in text and text.startswith("<s>[system]")
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokenizer.apply_chat(MESSAGES) == ids
    assert ids.count(0) == 1


@pytest.mark.parametrize(
    "template, text",
    [
        ("{% if tools is not none %}tools{% endif %}{{ documents is none }}", "True"),
        ("{{ tools is defined }} {{ pad_token is defined }} {{ eos_token is defined }}", "True False True"),
        ("{{ unk_token }}|{{ image_token }}", "|<i>"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        (
            "{% for m in messages %}\n  {% generation %}\n{{ m.role }}\n  {% endgeneration %}\n{% endfor %}",
            "system\nuser\n",
        ),
        ("{{ messages[1].content | tojson }}", '"naïve?"'),
        ("{{ messages[1].content | tojson(true) }}", '"na\\u00efve?"'),
        ("{{ [1, {'b': 2, 'a': 3}] | tojson(false, none, (',', ':'), true) }}", '[1,{"a":3,"b":2}]'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
    ],
)
def test_templates_get_what_transformers_gives(tmp_path, template, text):
    config = {"eos_token": "</s>", "pad_token": None, "image_token": "<i>", "chat_template": template}
    tokenizer = opened(
        tmp_path, byte_level(), tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **config}
    )
    assert tokenizer.render_chat(MESSAGES) == text
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == text


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "maximum recursion depth exceeded"),
        ("{{ '{2}'.format(1) }}", "tuple index out of range"),
        ("{{ 'a' * 10**15 }}", "MemoryError"),
        ("{% generation %}", "Unexpected end of template"),
    ],
)
def test_a_template_that_fails(tmp_path, template, reason):
    tokenizer = opened(tmp_path, byte_level(), tokenizer_config={"chat_template": template})
    with pytest.raises(UserError, match=f"refuses these messages: {reason}") as caught:
        tokenizer.apply_chat(MESSAGES)
    assert "\n" not in str(caught.value)


def test_chat_mistakes(tmp_path):
    tokenizer = opened(tmp_path, byte_level(), tokenizer_config={"bos_token": "<s>"})
    with pytest.raises(UserError, match="has no chat template"):
        tokenizer.apply_chat(MESSAGES)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(UserError, match="refuses these messages: unknown role tool"):
        tokenizer.apply_chat([{"role": "tool", "content": ""}])
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match="chat template"):
        tokenizer.apply_chat(MESSAGES)


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_template_cannot_leave_its_sandbox(tmp_path, attack):
    tokenizer = opened(tmp_path, byte_level())
    (tmp_path / "chat_template.jinja").write_text(attack)
    with pytest.raises(UserError, match="refuses"):
        tokenizer.apply_chat(list(MESSAGES))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.model", "chat_template.jinja"])
def test_what_may_not_be_read_is_named(tmp_path, unreadable, name):
    tokenizer = opened(tmp_path, byte_level(), tokenizer_config={})
    (tmp_path / name).write_text("{}")
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
    unreadable(name)
    with pytest.raises(UserError, match=f"{name} cannot be read: Permission denied$"):
        tokenizer.apply_chat(list(MESSAGES)) if "chat" in name else Tokenizer(tmp_path)


def test_no_or_damaged_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)

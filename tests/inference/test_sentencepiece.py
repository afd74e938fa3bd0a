"""`tokenizer.model` against the `sentencepiece` package: a model trained here, and the released ones of Mistral where
the package `mistral-common` is installed (`pip install --no-deps mistral-common`)."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import UserError
from moe_jax.inference.text import REPLACEMENT, Tokenizer
from tests.inference.test_text import MESSAGES, TEMPLATE, check_stream

spm = pytest.importorskip("sentencepiece")
ROOT = Path(__file__).parents[2]
# As Llama and Mixtral were trained.
LIKE_LLAMA = dict(
    model_type="bpe",
    vocab_size=600,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    split_digits=True,
    allow_whitespace_only_pieces=True,
    character_coverage=0.999,
    num_threads=1,
    minloglevel=2,
)
TEXT = (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "convert.py").read_text()
RELEASED = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"  # Mixtral-8x7B, Mixtral-8x22B-Instruct


def trained(**changes) -> bytes:
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=out, **{**LIKE_LLAMA, **changes}
    )
    return out.getvalue()


def opened(directory: Path, model: bytes, **files) -> Tokenizer:
    """The tokenizer of a directory with this tokenizer.model and JSON files."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model = trained(user_defined_symbols=["[REF]"])
    return opened(tmp_path_factory.mktemp("small"), model), spm.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module", params=RELEASED)
def released(tmp_path_factory, request):
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs pip install --no-deps mistral-common")
    model = (Path(found.submodule_search_locations[0]) / "data" / request.param).read_bytes()
    return opened(tmp_path_factory.mktemp("released"), model), spm.SentencePieceProcessor(model_proto=model)


PARTS = [
    "a",
    "the",
    " the",
    "tokenizer",
    "  ",
    " " * 17,
    "aaa",
    "\n",
    "\t",
    "é",
    "Ω",
    "日本",
    "🙂",
    "12",
    "=",
    "(",
    "_",
]
# U+2581 stands for a space; special tokens are recognised in a text, but not by SentencePiece.
TEXTS = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=40).map("".join),
    st.text(st.characters(codec="utf-8", exclude_characters=[REPLACEMENT, "\u2581", "[", "<"]), max_size=40),
)


def check(both, text: str) -> None:
    tokenizer, reference = both
    ids = tokenizer.encode(text)
    assert ids == [reference.bos_id(), *reference.encode(text)]
    assert tokenizer.decode(ids) == reference.decode(ids) == text
    check_stream(tokenizer, ids)


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_as_sentencepiece(small, text):
    check(small, text)


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_as_sentencepiece_with_released_models(released, text):
    check(released, text)


def test_long_texts(small, released):
    for both in (small, released):
        for text in (TEXT, "x = [\n" + "    " * 9 + "1,\n" + "  " * 7 + "]", "a" * 300, " " * 100, "🙂" * 9):
            if both is small or "[" not in text:
                check(both, text)


def test_ids_of_any_kind(small, released):
    """What a model may generate: bytes that are no characters, control tokens in between."""
    for tokenizer, reference in (small, released):
        some = [1, 2, *range(len(reference) - 40, len(reference))]
        some += [reference.piece_to_id(f"<0x{byte:02X}>") for byte in (*"é🙂".encode(), 0xFF, 0xC3)]
        for step in range(1, 30):
            ids = [some[i * step % len(some)] for i in range(60)]
            check_stream(tokenizer, ids)
            # A run of bytes that are no UTF-8 is all replaced by `tokenizers`, in part by SentencePiece.
            plain = [i for i in ids if not reference.is_control(i) and not reference.is_byte(i)]
            assert tokenizer.decode(plain) == reference.decode(plain)


def test_bytes_make_a_character_that_is_shown_whole(small):
    from moe_jax.inference.text import StreamDecoder

    tokenizer, reference = small
    ids = tokenizer.encode("a🙂b")
    assert sum(reference.is_byte(i) for i in ids) == 4
    stream = StreamDecoder(tokenizer)
    pieces = [*map(stream.push, ids), stream.flush()]
    assert "".join(pieces) == "a🙂b" and not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize(
    "config, prefix",
    [
        ({}, [1]),
        ({"add_bos_token": True, "bos_token": "<s>"}, [1]),
        ({"add_bos_token": False}, []),
        ({"bos_token": {"content": "</s>"}}, [2]),
    ],
)
def test_bos_once(tmp_path, config, prefix):
    tokenizer = opened(tmp_path, trained(), tokenizer_config=config)
    ids = tokenizer.encode("text")
    assert ids[: len(prefix)] == prefix and ids[len(prefix)] > 2
    assert tokenizer.encode("".join({1: "<s>", 2: "</s>"}[i] for i in prefix) + "text") == ids


def test_special_tokens_in_a_text_part_it(small):
    """As SentencePiece does, given the stretches between: each gets its space in front."""
    tokenizer, reference = small
    assert tokenizer.encode("<s>a b</s>c") == [1, *reference.encode("a b"), 2, *reference.encode("c")]
    assert tokenizer.decode(tokenizer.encode("a b</s>c")) == "a b c"


@pytest.mark.parametrize("legacy", [True, False])
def test_as_transformers(tmp_path, legacy):
    transformers = pytest.importorskip("transformers")
    decoder = {str(i): {"content": c, "special": True} for i, c in enumerate(["<unk>", "<s>", "</s>"])}
    decoder |= {"600": {"content": "<|im_start|>", "special": True}, "601": {"content": "<tool>", "special": False}}
    config = {
        "legacy": legacy,
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": decoder,
    }
    tokenizer = opened(tmp_path, trained(), tokenizer_config=config)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    for text in ("a b", "<|im_start|>a <tool>b</s>c", "the  <s>tokenizer"):  # it puts none before a space
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=True).input_ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_added_tokens(tmp_path):
    added = {"<|im_end|>": 600, "<|im_start|>": 601}
    tokenizer = opened(tmp_path, trained(), added_tokens=added, tokenizer_config={"eos_token": "<|im_end|>"})
    ids = tokenizer.encode("<|im_start|>user<|im_end|>")
    assert ids[1] == 601 and ids[-1] == 600
    assert tokenizer.decode(ids) == "<|im_start|> user"  # only what is named is special
    with pytest.raises(UserError, match=r"added_tokens\.json gives '<x>' the id 700, where 600 comes next; download"):
        opened(tmp_path, trained(), added_tokens={"<x>": 700})


def test_chat_names_the_tokens_of_the_model(tmp_path):
    tokenizer = opened(tmp_path, trained(), tokenizer_config={"chat_template": TEMPLATE})
    text = tokenizer.render_chat(MESSAGES)
    assert text.startswith("<s>") and text.endswith("</s>")
    assert tokenizer.apply_chat(MESSAGES).count(1) == 1


def test_tokenizer_json_comes_first(tmp_path):
    tokenizer = opened(tmp_path, trained())
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_text("not read")
    assert Tokenizer(tmp_path).decode(tokenizer.encode("a🙂b")) == "a🙂b"


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(model_type="unigram"), "model_type=unigram, which"),
        (dict(model_type="char"), "model_type=char"),
        (dict(byte_fallback=False), "byte_fallback=false"),
        (dict(normalization_rule_name="nfkc"), "precompiled_charsmap"),
        (dict(remove_extra_whitespaces=True), "remove_extra_whitespaces"),
        (dict(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, changes, part):
    with pytest.raises(UserError) as caught:
        opened(tmp_path, trained(**{"vocab_size": 400, **changes}))
    assert part in str(caught.value) and "write a tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda m: m[: len(m) // 2], lambda m: b"", lambda m: b"{}", lambda m: b"\xff" * 99])
def test_damaged_models(tmp_path, damage):
    with pytest.raises(UserError, match=r"tokenizer\.model (is not a SentencePiece model|asks for)"):
        opened(tmp_path, damage(trained()))

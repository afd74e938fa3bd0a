"""Tokenizer, splits, streams and batches on small made-up sources."""

import hashlib
import json
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moe_jax.training import corpus

WORDS = ["apple", "river", "stone", "window", "copper", "garden", "silver", "market", "button", "candle", "forest"]


def passage(name: str, lines: int) -> str:
    """Text that depends on `name` alone, in lines of more than 40 characters."""
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    return "".join(" ".join(rng.choice(WORDS, size=12)) + "\n" for _ in range(lines))


def document(name: str, lines: int = 40) -> corpus.Document:
    return corpus.Document(f"code/{name}", "code", passage(name, lines))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    source = "def f(x):\n        return self.x + 123\n" * 50
    return corpus.train_tokenizer([source, passage("tokenizer", 200)], vocab_size=400)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> corpus.Paths:
    root = tmp_path_factory.mktemp("sources")
    (root / "stdlib" / "site-packages").mkdir(parents=True)
    (root / "docs").mkdir()
    for i in range(40):
        (root / "stdlib" / f"m{i}.py").write_text(passage(f"code {i}", 40))
        (root / "docs" / f"d{i}.rst.txt").write_text(passage(f"docs {i}", 40))
    (root / "stdlib" / "site-packages" / "other.py").write_text(passage("other", 40))
    (root / "stdlib" / "latin.py").write_bytes(b"# caf\xe9\n")
    verses = []
    for i in range(66):  # the parser counts on all books being there
        letters = chr(65 + i // 26) + chr(97 + i % 26)
        for chapter in (1, 2):
            lines = passage(f"{letters} {chapter}", 30).splitlines()
            verses += [f"{letters}{chapter}:{n} {line}" for n, line in enumerate(lines, 1)]
    (root / "kjv.txt").write_text("\n".join(verses) + "\n")
    return corpus.Paths(root / "stdlib", root / "docs", root / "kjv.txt")


@given(text=st.text(st.characters(codec="utf-8")))
@settings(max_examples=200, deadline=None)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(
    text=st.lists(st.sampled_from(["\n", "\r\n", " ", "    ", "\t", "x", "don't", "_a", "12", "<s>", "</s>"])).map(
        "".join
    )
)
@settings(max_examples=200, deadline=None)
def test_tokenizer_round_trip_blanks_and_special_names(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_file_adds_bos(tokenizer, tmp_path):
    path = str(tmp_path / "tokenizer.json")
    tokenizer.save(path)
    plain, loaded = Tokenizer.from_file(path), corpus.load_tokenizer(path)
    assert [plain.token_to_id(t) for t in ("<s>", "</s>", "<pad>")] == [0, 1, 2]
    assert plain.encode("some text").ids[0] == 0
    assert plain.encode("").ids == [0]
    assert plain.encode("<s>").ids == [0, 0]
    assert 0 not in loaded.encode("<s>").ids[1:]


def test_indentation_is_one_token_and_digits_are_single(tokenizer):
    tokens = tokenizer.encode("def f(x):\n        return self.x + 123").tokens
    assert "Ċ" + 8 * "Ġ" in tokens
    assert ".x" in tokens
    assert tokens[-3:] == ["Ġ1", "2", "3"]


def test_read_kjv(tmp_path):
    path = tmp_path / "kjv.txt"
    path.write_text("Ge1:1 In the beginning\nGe1:2 And\nGe2:1 Thus\nExo1:1 Now\n")
    documents = corpus.read_kjv(path)
    names = ["prose/Genesis 1", "prose/Genesis 2", "prose/Exodus 1"]
    assert [document.name for document in documents] == names
    assert documents[0].text == "Genesis 1\n\n1 In the beginning\n2 And\n"


def test_read_documents_excludes(sources):
    names = {document.name for document in corpus.read_documents(sources)}
    assert len(names) == 40 + 40 + 132
    assert "code/m3.py" in names and "prose/Revelation 2" in names
    assert not names & {"code/latin.py", "code/site-packages/other.py"}


def test_drop_duplicates():
    whole, other = document("whole"), document("other")
    copy = corpus.Document("code/copy", "code", whole.text)
    indented = "".join(f"    {line}\n" for line in whole.text.splitlines()[:25])
    near = corpus.Document("code/near", "code", indented + passage("near", 5))
    short = [corpus.Document(f"code/short{i}", "code", "pass\n") for i in (1, 2)]
    names = {d.name for d in corpus.drop_duplicates([near, other, copy, whole, *short])}
    assert names == {"code/copy", "code/other", "code/short1"}  # of equal texts the first name stays


def test_split_is_a_partition_by_name_and_seed():
    documents = [document(str(i)) for i in range(60)]
    splits = corpus.split_documents(documents, seed=1, held_out_bytes=20_000)
    names = [d.name for split in splits.values() for d in split]
    assert sorted(names) == sorted(d.name for d in documents)
    for split in ("validation", "test"):
        assert len(splits[split]) >= 4
        assert abs(sum(d.size for d in splits[split]) - 20_000) < max(d.size for d in documents)
    assert corpus.split_documents(documents[::-1], 1, 20_000) == splits
    assert corpus.split_documents(documents, 2, 20_000) != splits


def test_split_keeps_shared_text_out_of_the_held_out_sets():
    shared = passage("shared", 10)
    copies = [corpus.Document(f"code/c{i}", "code", passage(f"c{i}", 40) + shared) for i in (0, 1)]
    small, large = document("small", 5), document("large", 400)
    documents = copies + [small, large] + [document(str(i)) for i in range(6)]
    splits = corpus.split_documents(documents, seed=0, held_out_bytes=40_000)
    assert {d.name for d in splits["train"]} == {"code/c0", "code/c1", "code/small", "code/large"}
    assert corpus.overlap(splits["test"], splits["train"]) == 0
    assert 0.15 < corpus.overlap(copies[:1], copies[1:]) < 0.25


def test_prepare_writes_once(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "HELD_OUT_BYTES", 20_000)
    manifest = corpus.prepare(sources, tmp_path, seed=3, vocab_size=300)
    tokenizer = corpus.load_tokenizer(tmp_path / "tokenizer.json")
    for domain in corpus.DOMAINS:
        stream = corpus.load_streams(tmp_path, "test")[domain]
        report = manifest["domains"][domain]["test"]
        assert stream.dtype == np.uint16 and len(stream) == report["tokens"]
        assert stream[0] == 0 and stream[-1] == 1
        assert (stream == 0).sum() == (stream == 1).sum() == len(report["documents"])
        text = (tmp_path / f"held_out_{domain}.txt").read_bytes().decode()
        assert tokenizer.decode(stream.tolist()) == text
        assert len(text) == report["bytes"] and abs(len(text) - 20_000) < 4_000
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest

    before = (tmp_path / "train_code.npy").stat().st_mtime_ns
    capsys.readouterr()
    assert corpus.prepare(sources, tmp_path, seed=3, vocab_size=300) == manifest
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "train_code.npy").stat().st_mtime_ns == before
    other = corpus.prepare(sources, tmp_path, seed=4, vocab_size=300)
    assert other["fingerprint"] != manifest["fingerprint"]
    (tmp_path / "train_code.npy").unlink()
    corpus.prepare(sources, tmp_path, seed=4, vocab_size=300)
    assert (tmp_path / "train_code.npy").exists()


@given(step=st.integers(0, 2**40), seed=st.integers(0, 2**31), context=st.integers(1, 9))
@settings(deadline=None)
def test_batch_is_pure_and_takes_windows(step, seed, context):
    streams = {"a": np.arange(10, dtype=np.uint16), "b": np.arange(100, 150, dtype=np.uint16)}
    rows = corpus.batch(streams, {"a": 1, "b": 3}, step, seed, 5, context)
    assert rows.shape == (5, context + 1) and rows.dtype == np.int32
    assert (np.diff(rows) == 1).all()  # windows of a stream that counts up, never across its end
    again = corpus.batch(dict(reversed(streams.items())), {"b": 3, "a": 1}, step, seed, 5, context)
    np.testing.assert_array_equal(rows, again)


def test_batch_follows_weights_step_and_seed():
    streams = {"a": np.zeros(50, np.uint16), "b": np.ones(5_000, np.uint16)}
    rows = corpus.batch(streams, {"a": 3, "b": 1}, 0, 0, 4000, 8)
    assert abs((rows[:, 0] == 0).mean() - 0.75) < 0.03
    assert (corpus.batch(streams, {"a": 0, "b": 1}, 0, 0, 50, 8) == 1).all()
    ramp = {"a": np.arange(10_000, dtype=np.uint16)}
    first, *others = (corpus.batch(ramp, {"a": 1}, step, seed, 4, 8) for step, seed in ((0, 0), (1, 0), (0, 1)))
    assert all((first != other).any() for other in others)
    with pytest.raises(ValueError, match="shorter than"):
        corpus.batch(streams, {"a": 1, "b": 1}, 0, 0, 4, 50)


def test_batch_reaches_both_ends_of_a_stream():
    rows = corpus.batch({"a": np.arange(6, dtype=np.uint16)}, {"a": 1}, 0, 0, 200, 3)
    assert set(rows[:, 0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"docs": "nowhere"}, "nowhere is no folder; give that of the manual's"),
        ({"kjv": "nowhere"}, "nowhere is no file; give one with the output of `bible"),
        ({"output": "{kjv}"}, "cannot be written (File exists); choose another place"),
        ({"output": "{kjv}/folder"}, "cannot be written (Not a directory); choose another place"),
        ({"limit": 2000}, "cannot be written (File too large); free some space and give the same command again"),
    ],
)
def test_a_mistake_at_the_command_line_is_one_line(sources, tmp_path, monkeypatch, capsys, wrong, said):
    monkeypatch.setattr(corpus, "running_stdlib", lambda: sources.stdlib)
    given = {"docs": str(sources.docs), "kjv": str(sources.kjv), "output": str(tmp_path / "out"), **wrong}
    limit = given.pop("limit", None)
    monkeypatch.setattr("sys.argv", ["corpus", *(text.format(kjv=sources.kjv) for text in given.values())])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit:  # as a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            corpus.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]

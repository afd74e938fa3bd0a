"""Text of three domains, made into a tokenizer and token streams.

`code` is the Python standard library (PSF licence), `docs` the sources of the Python manual (PSF licence), `prose` the
King James Bible (public domain). On Debian 12, without root:

    apt-get download python3.11-doc bible-kjv bible-kjv-text
    for p in *.deb; do dpkg-deb -x $p x; done
    # `bible` looks for bible.data in the working directory first.
    (cd x/usr/lib && ../bin/bible -f 'gen1:1-rev22:21') > kjv.txt
    # The standard library is that of the Python that runs this (here 3.11.7).
    python -m moe_jax.training.corpus x/usr/share/doc/python3.11/html/_sources kjv.txt tiny

Dims: B rows of a batch, T context in tokens, N tokens of a stream.
"""

import argparse
import hashlib
import json
import lzma
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe_jax.errors import UserError
from moe_jax.outputs import room

DOMAINS = ("code", "docs", "prose")
SPLITS = ("train", "validation", "test")
BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # ids 0, 1, 2
FORMAT = 1  # part of the fingerprint: raise it when the output changes
HELD_OUT_BYTES = 67_000  # of each domain, in test and again in validation
TOKENIZER_BYTES = 10_000_000  # of each domain, so that code does not take all merges
MAX_FILE_BYTES = 200_000  # a longer source is mostly a table or a repetitive test

# Tables, copies of the manual, machine-written settings, deliberately odd sources.
EXCLUDED_CODE = ("site-packages/", "dist-packages/", "pydoc_data/", "encodings/", "lib2to3/tests/data/")
EXCLUDED_CODE += ("_sysconfigdata", "config-")

# A word takes one character before it (" the", ".join", "_name"); digits stay single; a line end and the next
# line's indentation are one piece, so that "\n        " can become one token; other runs of blanks leave their
# last one to the word.
PIECES = (
    r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+|\s*\n[ \t]*|\s+(?!\S)|\s+"
)

BOOKS = """Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,2 Kings,
1 Chronicles,2 Chronicles,Ezra,Nehemiah,Esther,Job,Psalms,Proverbs,Ecclesiastes,Song of Solomon,Isaiah,Jeremiah,
Lamentations,Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk,Zephaniah,Haggai,Zechariah,Malachi,
Matthew,Mark,Luke,John,Acts,Romans,1 Corinthians,2 Corinthians,Galatians,Ephesians,Philippians,Colossians,
1 Thessalonians,2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,2 Peter,1 John,2 John,3 John,
Jude,Revelation""".replace("\n", "").split(",")


@dataclass(frozen=True)
class Paths:
    """Where the sources are: a stdlib folder, a folder of .rst.txt files, `bible -f` output."""

    stdlib: str | Path
    docs: str | Path
    kjv: str | Path


@dataclass(frozen=True)
class Document:
    """One file or chapter; `name` is unique and starts with the domain."""

    name: str
    domain: str
    text: str

    @property
    def size(self) -> int:
        """Length in UTF-8 bytes."""
        return len(self.text.encode())


def running_stdlib() -> Path:
    """The standard library of the Python that runs this."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_files(root: str | Path, pattern: str, domain: str, excluded: Sequence[str] = ()):
    """Documents of the UTF-8 files below `root`, leaving out long, empty and excluded ones."""
    for path in sorted(Path(root).rglob(pattern)):
        name = path.relative_to(root).as_posix()
        if name.startswith(tuple(excluded)) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(f"{domain}/{name}", domain, text)


def read_kjv(path: str | Path) -> list[Document]:
    """One document per chapter, from lines such as "Ge1:1 In the beginning ..."."""
    chapters: dict[str, list[str]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        place, _, text = line.partition(" ")
        chapter, _, verse = place.partition(":")
        chapters.setdefault(chapter, []).append(f"{verse} {text}")
    shorts = dict.fromkeys(chapter.rstrip("0123456789") for chapter in chapters)  # in the order of BOOKS
    titles = dict(zip(shorts, BOOKS, strict=False))
    documents = []
    for chapter, verses in chapters.items():
        short = chapter.rstrip("0123456789")
        title = f"{titles[short]} {chapter[len(short) :]}"
        documents.append(Document(f"prose/{title}", "prose", "\n".join([title, "", *verses, ""])))
    return documents


def long_lines(text: str) -> set[str]:
    """Distinct lines of 40 or more characters, without indentation and verse numbers."""
    lines = (line.strip().lstrip("0123456789 ") for line in text.splitlines())
    return {line for line in lines if len(line) >= 40}


def drop_duplicates(documents: Iterable[Document]) -> list[Document]:
    """Drop exact copies, and texts half of whose long lines are in one larger text."""
    kept, texts, owner = [], set(), {}
    for document in sorted(documents, key=lambda document: (-document.size, document.name)):
        lines = long_lines(document.text)
        shared = Counter(owner[line] for line in lines if line in owner)
        copied = max(shared.values(), default=0)
        if document.text in texts or (copied and copied >= len(lines) / 2):
            continue
        kept.append(document)
        texts.add(document.text)
        owner.update((line, document.name) for line in lines if line not in owner)
    return sorted(kept, key=lambda document: document.name)


def read_documents(paths: Paths) -> list[Document]:
    """All documents of the three domains, without near-duplicates, sorted by name."""
    code = read_files(paths.stdlib, "*.py", "code", EXCLUDED_CODE)
    # The changelog is a list of a thousand one-line entries, not text.
    docs = read_files(paths.docs, "*.rst.txt", "docs", ("whatsnew/changelog",))
    return drop_duplicates([*code, *docs, *read_kjv(paths.kjv)])


def split_documents(
    documents: Sequence[Document], seed: int, held_out_bytes: int = HELD_OUT_BYTES
) -> dict[str, list[Document]]:
    """Give every document to "train", "validation" or "test", whole.

    In each domain the documents are visited by the hash of (seed, name); those of 2 to 15 kB fill test, then
    validation, to about `held_out_bytes` each, and the rest is for training. A document is held out only if at most
    5% of its distinct long lines are in any other document. Lines in more than 8 documents do not count here: they
    are licence headers and rST directives; counting them would keep files with a header out of the test. `overlap`
    reports the share with them in.
    """
    lines = {document.name: long_lines(document.text) for document in documents}
    seen_in = Counter(line for found in lines.values() for line in found)
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    margin = held_out_bytes // 60
    for domain in sorted({document.domain for document in documents}):
        room = {"test": held_out_bytes, "validation": held_out_bytes}
        ranked = [document for document in documents if document.domain == domain]
        ranked.sort(key=lambda d: hashlib.sha256(f"{seed}/{d.name}".encode()).digest())
        for document in ranked:
            found = lines[document.name]
            shared = sum(2 <= seen_in[line] <= 8 for line in found)
            suits = 2_000 <= document.size <= 15_000 and found and shared <= 0.05 * len(found)
            fits = (s for s in room if suits and room[s] > margin and document.size <= room[s] + margin)
            split = next(fits, "train")
            splits[split].append(document)
            if split != "train":
                room[split] -= document.size
    return splits


def overlap(held_out: Sequence[Document], train: Sequence[Document]) -> float:
    """Share of the long lines of `held_out` that also occur in `train`, boilerplate included."""
    known = set().union(*(long_lines(document.text) for document in train))
    lines = [line for document in held_out for line in long_lines(document.text)]
    return sum(line in known for line in lines) / max(1, len(lines))


def first_texts(documents: Sequence[Document]) -> Iterable[str]:
    """Whole texts in turn, until they reach TOKENIZER_BYTES."""
    before = np.cumsum([0, *(d.size for d in documents)])[:-1]
    return (d.text for d, start in zip(documents, before, strict=True) if start < TOKENIZER_BYTES)


def train_tokenizer(train_texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Byte-level BPE of `vocab_size` ids: 3 special tokens, 256 bytes, merges."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # no string is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(train_texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read tokenizer.json so that a "<s>" written in a text stays text.

    The file cannot hold that choice: plain `Tokenizer.from_file` reads it as the token 0.
    """
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_stream(tokenizer: Tokenizer, documents: Sequence[Document]) -> np.ndarray:
    """Token stream uint16 [N]: bos, tokens, eos of each document in turn."""
    if tokenizer.get_vocab_size() > 2**16:
        raise ValueError("token ids must fit in uint16")
    eos = tokenizer.token_to_id(EOS)
    encoded = tokenizer.encode_batch_fast([document.text for document in documents])
    return np.concatenate([np.array([*one.ids, eos], np.uint16) for one in encoded])


def prepare(paths: Paths, out_dir: str | Path, seed: int, vocab_size: int) -> dict:
    """Write tokenizer, streams, held-out texts and manifest.json; return the manifest.

    A second call does nothing when the manifest there has the same fingerprint.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    documents = read_documents(paths)
    choices = [FORMAT, HELD_OUT_BYTES, TOKENIZER_BYTES, PIECES, seed, vocab_size]
    everything = json.dumps([choices, [(d.name, d.text) for d in documents]])
    fingerprint = hashlib.sha256(everything.encode()).hexdigest()
    manifest_path = out / "manifest.json"
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text())
        complete = all((out / file).exists() for file in manifest["files"])
        if manifest["fingerprint"] == fingerprint and complete:
            print(f"{out} is up to date")
            return manifest
        manifest_path.unlink()  # it must not vouch for files half rewritten
    splits = split_documents(documents, seed, HELD_OUT_BYTES)
    rng = np.random.default_rng(seed)
    streams: dict[tuple[str, str], list[Document]] = {}
    for split in SPLITS:
        for domain in DOMAINS:
            chosen = sorted((d for d in splits[split] if d.domain == domain), key=lambda d: d.name)
            streams[split, domain] = [chosen[i] for i in rng.permutation(len(chosen))]
    print(f"{len(documents)} documents; training the tokenizer", flush=True)
    texts = (text for domain in DOMAINS for text in first_texts(streams["train", domain]))
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)

    files, domains = ["tokenizer.json"], {domain: {} for domain in DOMAINS}
    for (split, domain), chosen in streams.items():
        stream = encode_stream(tokenizer, chosen)
        np.save(out / f"{split}_{domain}.npy", stream)
        files.append(f"{split}_{domain}.npy")
        size = sum(d.size for d in chosen)
        report = {
            "bytes": size,
            "tokens": len(stream),
            "bytes_per_token": round(size / (len(stream) - 2 * len(chosen)), 4),  # without bos and eos
            "documents": [d.name for d in chosen],
        }
        if split == "test":
            text = "".join(document.text for document in chosen).encode()
            (out / f"held_out_{domain}.txt").write_bytes(text)
            files.append(f"held_out_{domain}.txt")
            packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
            report["xz_bits_per_byte"] = round(8 * len(packed) / len(text), 4)
            report["long_lines_in_train"] = round(overlap(chosen, splits["train"]), 4)
        domains[domain][split] = report
        print(split, domain, {k: v for k, v in report.items() if k != "documents"}, flush=True)
    sources = {name: str(value) for name, value in vars(paths).items()}
    manifest = {"fingerprint": fingerprint, "seed": seed, "vocab_size": vocab_size}
    manifest |= {"sources": sources, "files": files, "domains": domains}
    manifest_path.write_text(json.dumps(manifest, indent=1) + "\n")  # last: it marks completion
    return manifest


def load_streams(folder: str | Path, split: str) -> dict[str, np.ndarray]:
    """Memory-mapped uint16 [N] streams of a split, by domain."""
    return {domain: np.load(Path(folder) / f"{split}_{domain}.npy", mmap_mode="r") for domain in DOMAINS}


def batch(
    streams: Mapping[str, np.ndarray], weights: Mapping[str, float], step: int, seed: int, batch_size: int, context: int
) -> np.ndarray:
    """Batch of `step`, int32 [B, T+1]: inputs are [:, :-1], targets [:, 1:].

    Each row takes a domain by weight, then a random window of its stream. A pure function of its arguments, so that a
    resumed run sees the same data.
    """
    domains = sorted(weights)  # not the order of the caller's dictionary
    if short := [domain for domain in domains if len(streams[domain]) <= context]:
        raise ValueError(f"streams shorter than {context + 1} tokens: {short}")
    rng = np.random.default_rng([seed, step])
    shares = np.array([weights[domain] for domain in domains], np.float64)
    rows = []
    for choice in rng.choice(len(domains), size=batch_size, p=shares / shares.sum()):
        stream = streams[domains[choice]]
        start = rng.integers(len(stream) - context)
        rows.append(stream[start : start + context + 1])
    return np.stack(rows).astype(np.int32)


def main() -> None:
    """`prepare` from the command line; a mistake of the user ends in one line."""
    parser = argparse.ArgumentParser(
        "python -m moe_jax.training.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("docs", type=Path, help="folder of the manual's .rst.txt files")
    parser.add_argument("kjv", type=Path, help="what `bible -f 'gen1:1-rev22:21'` prints")
    parser.add_argument("output", type=Path, help="folder to write, for train_lm.py")
    args = parser.parse_args()
    if not args.docs.is_dir():
        parser.error(f"{args.docs} is no folder; give that of the manual's .rst.txt files")
    if not args.kjv.is_file():
        parser.error(f"{args.kjv} is no file; give one with the output of `bible -f 'gen1:1-rev22:21'`")
    try:
        with room(args.output):
            prepare(Paths(running_stdlib(), args.docs, args.kjv), args.output, seed=0, vocab_size=4096)
    except UserError as error:
        parser.error(str(error))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        parser.error(f"{error.filename} cannot be written ({error.strerror}); choose another place")


if __name__ == "__main__":
    main()

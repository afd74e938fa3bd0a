"""How long a conversion takes beside a plain copy of the same files, both from a cold page cache and onto the disk.

    python -m tests.checkpoint.convert_speed [--gigabytes=4] [--turns=3] [--folder=DIR] [FORM ...]

Each turn copies (`cp --reflink=never`, then fsync of every file) and converts (all of `convert.py`, imports too), one
after the other, in an order that changes from turn to turn. FORM is none (the default), bf16, int8 or int4.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.checkpoint.big import drop_from_cache, mixtral_of, write_big

ROOT = Path(__file__).parents[2]


def copy(source: Path, target: Path) -> None:
    """What a conversion is measured against."""
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    for path in (*target.iterdir(), target):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def convert(source: Path, target: Path, form: str) -> None:
    """The whole script, its start and its imports included."""
    command = [sys.executable, "convert.py", f"--checkpoint={source}", f"--output={target}", f"--quantization={form}"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: that of temporary files")
    parser.add_argument("forms", nargs="*", metavar="FORM")
    options = parser.parse_args()
    ways = {"cp": copy} | {
        form: lambda source, target, form=form: convert(source, target, form) for form in options.forms or ["none"]
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        size = write_big(source, mixtral_of(options.gigabytes * 1e9))
        for turn in range(options.turns):
            for way in list(ways)[:: 1 if turn % 2 else -1]:
                drop_from_cache(source)
                os.sync()
                began = time.perf_counter()
                ways[way](source, target)
                seconds[way].append(time.perf_counter() - began)
                shutil.rmtree(target)
    print(f"{size / 1e9:.2f} GB in bfloat16, cold page cache, {options.turns} interleaved turns")
    for way, times in seconds.items():
        ratios = [own / cp for own, cp in zip(times, seconds["cp"], strict=True)]
        each = ", ".join(f"{t:.1f}" for t in times)
        print(f"{way:5} {each} s   times cp: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()

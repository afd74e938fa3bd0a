"""The same weights, prompt and token count in every engine, each alone under one memory cap, with a cold page cache.

Every peer runs in several settings; the best of them counts. Greedy tokens are compared with this engine's own, all
experts resident, in float32.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.converted import open_checkpoint
from moe_jax.cli import MALLOC
from moe_jax.errors import UserError
from moe_jax.evaluation.gguf_file import write_gguf
from moe_jax.evaluation.peers.cgroup import MemoryCap, drop_from_page_cache
from moe_jax.evaluation.peers.run import Run

OURS = "moe_jax"
TIMEOUT_S = 900.0


@dataclasses.dataclass(frozen=True)
class Contender:
    """An engine in one setting.

    Attributes:
      setting: for a person.
      spec: what `contender.py` is told.
      files: that it reads its weights from.
      capped: whether it runs under the cap; what is resident cannot.
    """

    engine: str
    setting: str
    spec: dict[str, Any]
    files: tuple[Path, ...]
    capped: bool = True

    def command(self) -> list[str]:
        """Of its process."""
        return [sys.executable, "-m", "moe_jax.evaluation.peers.contender", json.dumps(self.spec)]


@dataclasses.dataclass
class Result:
    """What became of a contender: runs, or why there are none."""

    contender: Contender
    runs: list[Run] = dataclasses.field(default_factory=list)
    same_tokens: int = 0  # that agree with the reference before the first that does not
    peak_bytes: int = 0  # of the group, page cache included
    failure: str = ""
    metrics: dict[str, Any] | None = None

    @property
    def tpot_s(self) -> float | None:
        """Mean over its runs."""
        return sum(run.tpot_s for run in self.runs) / len(self.runs) if self.runs else None


def race(
    reference: Contender,
    contenders: Sequence[Contender],
    cap_bytes: int,
    rounds: int,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Result]:
    """Runs the reference once, then every contender once a round, in turn; a result each, the reference's first.

    Raises:
      UserError: no memory control group can be made, or the reference fails.
    """
    results = [Result(contender) for contender in contenders]
    with MemoryCap(cap_bytes):
        pass  # is there one at all? better known before the first run
    progress("the reference ...")
    first = Result(reference)
    _run(first, [], cap_bytes)
    if first.failure:
        raise UserError(f"the reference run failed: {first.failure}")
    tokens = first.runs[0].token_ids
    first.same_tokens = len(tokens)
    for _ in range(rounds):
        for result in results:
            if not result.failure:
                who = f"{result.contender.engine}, {result.contender.setting}"
                progress(f"{who} ...")
                _run(result, tokens, cap_bytes)
                progress(f"{who}: {result.failure or f'{1e3 * result.runs[-1].tpot_s:.1f} ms per token'}")
    return [first, *results]


def _run(result: Result, tokens: list[int], cap_bytes: int) -> None:
    contender = result.contender
    drop_from_page_cache(contender.files)
    environment = {**os.environ, **(MALLOC if contender.engine == OURS else {})}
    try:
        if contender.capped:
            with MemoryCap(cap_bytes) as cap:
                done = cap.run(contender.command(), environment, TIMEOUT_S)
                result.peak_bytes = max(result.peak_bytes, cap.peak_bytes())
        else:
            done = subprocess.run(
                contender.command(), env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
    except subprocess.TimeoutExpired:
        result.failure = f"not done after {TIMEOUT_S:g} s"
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        result.failure = "killed: out of memory" if done.returncode in (-9, 137) else last
        return
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    run = Run(**answer["run"])
    result.runs.append(run)
    result.metrics = answer.get("metrics")
    pairs = zip(run.token_ids, tokens, strict=False)
    result.same_tokens = next((i for i, (a, b) in enumerate(pairs) if a != b), len(run.token_ids))


class Entry(NamedTuple):
    """What is raced on.

    Attributes:
      released, bank: the model as a Hugging Face directory, and converted.
      folder: for GGUF files and offloaded weights, kept between calls.
      prompt, prompt_ids: the same.
    """

    released: Path
    bank: Path
    folder: Path
    prompt: str
    prompt_ids: list[int]
    new_tokens: int


def contenders(
    entry: Entry, budgets: Sequence[str], predictors: Sequence[str], predictor: str
) -> tuple[Contender, list[Contender]]:
    """The reference (ours, resident, float32), and everybody who races; writes the files that they need.

    Args:
      budgets: device budgets that ours may use, see `config.offload.device_budget`; predictors: with which it runs.
      predictor: directory of the trained predictor, or "".
    """
    from moe_jax.evaluation.peers.torch_models import prepare_offload

    released, bank, work, prompt, prompt_ids, new_tokens = entry
    work.mkdir(parents=True, exist_ok=True)
    shared = {"prompt_ids": prompt_ids, "new_tokens": new_tokens}

    def ours(tier: str, budget: str, name: str, bank: Path = bank) -> dict[str, Any]:
        offload = {"tier": tier, "device_budget": budget, "policy": "lru" if name == "none" else "predicted"}
        prefetch = {"predictor": name, "checkpoint": predictor}
        config = {"checkpoint": str(bank), "offload": offload, "prefetch": prefetch}
        return {"engine": OURS, "config": config, "prompt": prompt, "bounds": tier == "disk", **shared}

    reference = Contender(OURS, "resident", ours("none", "100%", "none"), (bank,), capped=False)
    banks = {"": bank}
    if open_checkpoint(bank).dtype == "bfloat16":
        banks[", packed"] = _apart(_packed, bank, work / "packed")
    racing = [
        Contender(OURS, f"disk, budget {budget}, {name}{form}", ours("disk", budget, name, files), (files,))
        for budget in budgets
        for name in predictors
        for form, files in banks.items()
    ]
    for dtype in ("bfloat16", "float32"):
        file = _apart(write_gguf, released, work / f"{dtype}.gguf", dtype)
        for loading in ("mmap", "mmap_random"):
            spec = {"engine": "llama.cpp", "file": str(file), "loading": loading, **shared}
            racing.append(Contender("llama.cpp", f"{loading}, {dtype}", spec, (file,)))
        folder = _apart(prepare_offload, released, work / f"accelerate-{dtype}", dtype)
        for buffers in (False, True):
            torch = {"checkpoint": str(released), "dtype": dtype, **shared}
            spec = {"engine": "accelerate", "folder": str(folder), "buffers": buffers, **torch}
            setting = f"disk_offload, {dtype}" + (", offload_buffers" if buffers else "")
            racing.append(Contender("accelerate", setting, spec, (folder,)))
        spec = {"engine": "transformers", "checkpoint": str(released), "dtype": dtype, **shared}
        racing.append(Contender("transformers", f"resident, {dtype}, no cap", spec, (released,), capped=False))
    return reference, racing


def _packed(bank: Path, folder: Path) -> Path:
    return convert(open_checkpoint(bank), folder, "packed").directory


def _apart(write: Callable[..., Path], *args: Any) -> Path:
    """Calls it in a process of its own: what it holds, up to the whole model in float32, ends with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(write, *args).result()


def require() -> None:
    """Raises UserError when a peer is not installed."""
    import importlib.util

    packages = ("accelerate", "gguf", "torch", "transformers", "xllamacpp")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"--peers needs {', '.join(missing)}: pip install 'moe_jax[peers]'")

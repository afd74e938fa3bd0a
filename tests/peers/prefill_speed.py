"""Time to prefill a long prompt with the experts on a disk, beside what the machine allows.

    python -m tests.peers.prefill_speed --folder=/tmp/resident_speed

Takes the model of `resident_speed.py` (made there if need be) and converts it once, in bfloat16 as it is. In turns: the
engine with every expert resident, which runs the same executables (C); a plain reader that reads every expert that the
prompt needs, once, past the page cache (T, at its best depth); and the disk tier at each budget, its store empty. Least
and median seconds over the turns are printed, and the disk tier's over max(C, T).
"""

import argparse
import contextlib
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.config import OffloadConfig
from moe_jax.evaluation.reader import DiskReader, Reading, best_depth
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.inference.state import Record
from moe_jax.model.decoder import Stages, device_weights
from moe_jax.offload.open import open_source
from tests.peers.resident_speed import model_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--budgets", nargs="+", default=["25%", "min"], help="min: the smallest legal")
    args = parser.parse_args()
    source = HFCheckpoint(model_in(args.folder, args.layers))
    checkpoint = convert(source, args.folder / f"{args.layers}-layers-bank")
    a = checkpoint.architecture
    stages, resident = Stages(a, jnp.float32), ResidentExperts(checkpoint)
    engine = Engine(stages, device_weights(checkpoint.dense(), jnp.float32), resident)
    prompt = np.random.default_rng(0).integers(3, a.vocab_size, args.tokens).tolist()

    def prefill(experts: Any) -> tuple[float, bytes]:
        engine.source = experts
        began = time.perf_counter()
        logits = np.asarray(engine.prefill([prompt], 40)[0])
        return time.perf_counter() - began, logits.tobytes()

    engine.record = Record()
    _, expected = prefill(resident)
    needed = [(layer, expert) for layer, row in enumerate(engine.record.prefill_needed) for expert in row]
    engine.record = None
    times: dict[str, list[float]] = {"C, resident": [], "T, plain reader": []}
    reader = DiskReader(checkpoint)
    depth = best_depth(reader.move, needed[: len(needed) // 4])
    for _ in range(args.turns):
        times["C, resident"].append(prefill(resident)[0])
        times["T, plain reader"].append(Reading(reader.move, needed, depth).seconds())
        for text in args.budgets:
            budget = f"{a.top_k * checkpoint.expert_bytes}B" if text == "min" else text
            config = OffloadConfig(tier="disk", device_budget=budget)
            with contextlib.closing(open_source(config, checkpoint, jnp.dtype(jnp.float32), None)) as experts:
                seconds, logits = prefill(experts)
                assert logits == expected, "the disk tier gives other logits"
                budget_mb = experts.store.budget_bytes / 1e6
            times.setdefault(f"disk, {text} ({budget_mb:.0f} MB)", []).append(seconds)
    size = checkpoint.expert_bytes / 1e6
    print(f"{args.tokens} tokens need {len(needed)} experts of {size:.1f} MB; load {os.getloadavg()[0]:.1f}")
    bound = max(statistics.median(times["C, resident"]), statistics.median(times["T, plain reader"]))
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"{name:24} least {min(found):6.2f} s  median {middle:6.2f} s  {middle / bound:.2f} of max(C, T)")
    reader.close()


if __name__ == "__main__":
    main()

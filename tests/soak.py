"""Runs the disk tier for long at its smallest budget, with random delays of reads, and checks everything all the time.

    python tests/soak.py [--tokens=20000] [--checkpoint=DIR] [--predictor=router] [--policy=lru]

Checked: tokens equal those of the resident model; after each text all live arrays are the bank's bytes; the bytes
counted by cause are those that the kernel says were read, within 1%; anonymous memory does not grow. Takes minutes.
Exit code 1 and one line if something does not hold.
"""

from __future__ import annotations

import random
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import moe_jax
from moe_jax import cli
from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.inference.session import shipped
from moe_jax.offload.disk import DiskBank
from moe_jax.trace import Trace

TOKENS = flags.DEFINE_integer("tokens", 20_000, "Decode steps in all.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "", "A Hugging Face directory; default the shipped model.")
PREDICTOR = flags.DEFINE_string("predictor", "learned", "config.prefetch.predictor")
POLICY = flags.DEFINE_string("policy", "predicted", "config.offload.policy")
PIECE = 200  # tokens of one text


def process(file: str, name: str) -> int:
    """A number of /proc/self/FILE."""
    line = next(line for line in Path(f"/proc/self/{file}").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def main() -> None:
    directory = CHECKPOINT.value or str(shipped("model"))
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "bank"
        with cli.status("converting"):
            convert(HFCheckpoint(directory), converted)
        soak(converted, directory)


def soak(converted: Path, directory: str) -> None:
    a = HFCheckpoint(directory).architecture
    prefetch = {"predictor": PREDICTOR.value, "checkpoint": str(shipped("predictor")) if not CHECKPOINT.value else ""}
    resident = moe_jax.load(str(converted), offload={"tier": "none"}, prefetch={"predictor": "none"})
    bank = DiskBank(resident.checkpoint)  # pyright: ignore[reportArgumentType]
    budget = f"{a.top_k * bank.expert_bytes}B"
    bank.close()
    offload = {"tier": "disk", "device_budget": budget, "policy": POLICY.value}
    model = moe_jax.load(str(converted), offload=offload, prefetch=prefetch)
    source: Any = model.engine.source
    pauses, texts, read = random.Random(0), random.Random(0), source.bank.read

    def delayed(*args: Any) -> None:
        if pauses.random() < 0.2:  # by several threads, in any order
            time.sleep(pauses.random() * 2e-3)
        read(*args)

    source.bank.read = delayed
    text = next(shipped("held_out").glob("held_out_*.txt")).read_text()
    done = turn = 0
    memory: list[int] = []
    before, counted = -1, 0
    while done < TOKENS.value:
        prompt = text[(at := texts.randrange(len(text) - 200)) : at + 100]
        generation = model.start([prompt], PIECE)
        generation.trace = Trace()
        if before < 0:
            before = process("io", "read_bytes")  # compiled, loaded
        for _ in generation:
            pass
        counted += sum(load.bytes for load in generation.trace.loads)
        reference = resident.start([prompt], PIECE)
        for _ in reference:
            pass
        if generation.outputs != reference.outputs:
            raise SystemExit(f"soak: after {done} tokens the text is another than the resident model's")
        check_live(model, source)
        done += len(generation.outputs[0].token_ids)
        turn += 1
        memory.append(process("status", "RssAnon") * 1024)
        if turn % 10 == 0:
            read_now = process("io", "read_bytes") - before
            print(f"{done} tokens, RssAnon {memory[-1] / 1e6:.1f} MB, {counted / 1e6:.1f} MB counted,"
                  f" {read_now / 1e6:.1f} MB read", flush=True)  # fmt: skip
    source._loader.make_room(source.store.capacity)
    read_in_all = process("io", "read_bytes") - before
    if abs(counted - read_in_all) > 0.01 * read_in_all:
        raise SystemExit(f"soak: {counted} bytes counted, {read_in_all} read")
    # In the first quarter prompts of every length are compiled for, and the kernel makes huge pages of small ones.
    quarter = max(1, len(memory) // 4)
    second, last = np.median(memory[quarter : 2 * quarter]), np.median(memory[-quarter:])
    print(f"{done} tokens equal to the resident model's; RssAnon {second / 1e6:.1f} MB in the second quarter,"
          f" {last / 1e6:.1f} MB in the last; {counted} bytes counted, {read_in_all} read")  # fmt: skip
    if last > 1.01 * second:
        raise SystemExit("soak: memory grows")
    model.close()


def check_live(model: Any, source: Any) -> None:
    """Every expert on the device is the bank's."""
    source._loader.make_room(0)
    for key, entry in source.store.resident.items():
        for live, stored in zip(entry.weights[:2], model.checkpoint.expert(*key)[:2], strict=True):
            if zlib.crc32(np.asarray(live).tobytes()) != zlib.crc32(stored.tobytes()):
                raise SystemExit(f"soak: layer {key[0]} expert {key[1]} on the device is not the bank's")


if __name__ == "__main__":
    cli.run(main)

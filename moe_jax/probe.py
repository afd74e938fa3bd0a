"""Measures the machine it runs on, in under a minute, and writes the settings that offloading uses there.

    python -m moe_jax.probe                            the device that jax finds, and the disk of the cache folder
    python -m moe_jax.probe --folder=/mnt/nvme         another disk (writes a file there, and removes it)
    python -m moe_jax.probe --file=OUT/experts-00001-of-00032.safetensors      a file that is there

It prints bandwidth from pinned host memory to the device by size, how much of a copy hides behind compute and who must
issue it, the rate of random reads from disk by size and threads, and the rate at which weights are read by a
matrix-vector product. The settings go to ~/.cache/moe_jax/settings-PLATFORM.json (--output: elsewhere), where every run
on that platform finds them; without the file the defaults of `moe_jax.offload.settings` hold. Settings change speed,
never a result. Run it on an otherwise idle machine.

What is verified, and where
---------------------------
On a CPU, by tests and measurements: everything that is computed; that exact mode's logits are bitwise those of the
engine with every expert resident; real copies between memory kinds and their overlap with compute through a thread; the
disk tier.
For an H100 and a TPU v5e, by compiling for them without one (tests/aot): that both compile; that no expert's weights
are widened, transposed or copied; that nothing is computed on the host; how many executables there are; that weights,
cache, budget and temporaries fit.
On an H100 (PCIe 5.0 x16, jax 0.11.2): tests/inference/test_lossless.py; that logits are the same bits with every expert
resident, from host memory and from disk, in float32 and bfloat16, in processes that compile for themselves; that copies
from pinned_host run beside compute, if they are issued before it: 0.7 of 32 MiB is hidden behind compute of the same
length, 0.07 after it, as a new buffer is usable only after the compute enqueued before its allocation; 41 GB/s of one
copy of 64 MiB, 50 GB/s of several, and 0.15 ms for the smallest.
Not seen on hardware: a TPU; the pinned pool's limit (`moe_jax/offload/pinned.py`); parity of every family with
`transformers` on an accelerator.

What the first user of another GPU or a TPU should check
--------------------------------------------------------
1. Here: the largest copies come near the link's rate (PCIe 4.0 x16: about 25 GB/s, 5.0: about 50). "before compute"
   hides 0.7 or more beside both, and "after compute" clearly less on a GPU. If "after" or "a thread" wins, the
   settings follow (thread) or the last line says that they cannot (after): please tell us.
2. `JAX_PLATFORMS=cuda,cpu python -m pytest tests/inference/test_lossless.py tests/families`: the first invariant, and
   the released models' numbers, on this backend.
3. `python infer.py --config=configs/mixtral.py --output_json=run.json`: "peak expert bytes" stays within the budget.
4. A model whose experts need more than 64 GB of host memory loads: the pinned pool's limit is raised for it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from absl import flags

from moe_jax import cli, outputs
from moe_jax.errors import UserError

OUTPUT = flags.DEFINE_string("output", None, "Where to write the settings; default: where every run looks for them.")
FILE = flags.DEFINE_string("file", None, "Read this file instead of writing one.")
FOLDER = flags.DEFINE_string("folder", None, "Write a file here to read from disk; default: the cache folder.")
SECONDS = flags.DEFINE_float("seconds", 0.4, "Time given to one measurement.", lower_bound=0.0)

FILE_BYTES = 512 * 2**20
LEAST_BYTES = 64 * 2**20


def main() -> None:
    if FILE.value and FOLDER.value:
        raise UserError("give --file to read what is there or --folder to write a file there, not both")
    import jax

    from moe_jax.offload import measure
    from moe_jax.offload.settings import Settings, settings_file

    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    output = Path(OUTPUT.value) if OUTPUT.value else settings_file(platform)
    outputs.make_folder(f"--output={output}", output.absolute().parent)
    outputs.check("output", output)
    print(f"{platform}: {kind}")
    with cli.status("reading from disk (1 of 4)"):
        reads = _reads(SECONDS.value)
    with cli.status("copying to the device (2 of 4)"):
        puts = measure.puts(SECONDS.value)
    with cli.status("copying beside compute (3 of 4)"):
        overlaps = measure.overlaps(5 * SECONDS.value)
    with cli.status("multiplying (4 of 4)"):
        matvecs = measure.matvecs(SECONDS.value)
    settings = measure.choose(platform, puts, overlaps, reads)
    measured = {
        "device_kind": kind,
        "jax": jax.__version__,
        "puts": [p._asdict() | {"bytes_per_s": p.bytes_per_s} for p in puts],
        "overlaps": [o._asdict() | {"hidden": o.hidden} for o in overlaps],
        "reads": [r._asdict() for r in reads],
        "matvec_bytes_per_s": matvecs,
    }
    settings.save(output, platform, measured)
    _show(puts, overlaps, reads, matvecs)
    default = Settings.default(platform)
    for name in default.__dataclass_fields__:
        value, usual = getattr(settings, name), getattr(default, name)
        print(f"{name} = {value}" + ("" if value == usual else f" (default {usual})"))
    print(f"written to {output}")
    hidden = {how: min(o.hidden for o in overlaps if o.how == how) for how in ("before", "after")}
    if settings.issue_mode == "inline" and hidden["after"] > hidden["before"] + measure.CLEARLY:
        print("copies hide better when issued after the compute, which nothing here does: please tell us")


def _reads(seconds: float) -> list:
    from moe_jax.offload import measure
    from moe_jax.offload.settings import cache_folder

    try:
        if FILE.value:
            if os.stat(FILE.value).st_size < LEAST_BYTES:
                raise UserError(f"--file={FILE.value} is smaller than {LEAST_BYTES} bytes; give a larger one")
            return measure.reads(Path(FILE.value), seconds)
        folder = Path(FOLDER.value) if FOLDER.value else cache_folder()
        if not FOLDER.value:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="probe-") as file:
            block = os.urandom(2**20)
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return measure.reads(Path(file.name), seconds)
    except OSError as error:
        flag = f"--file={FILE.value}" if FILE.value else f"--folder={FOLDER.value or cache_folder()}"
        raise UserError(f"{flag}: {error.strerror or error}; give another one") from None


def _show(puts: list, overlaps: list, reads: list, matvecs: dict[str, float]) -> None:
    """Tables for a person."""
    from rich.console import Console
    from rich.table import Table

    from moe_jax.offload.measure import PUT_LIST, THREADS

    console = Console()
    console = console if console.is_terminal else Console(width=110)
    rate = lambda bytes_per_s: f"{bytes_per_s / 1e9:.2f}"
    size = lambda n: f"{n // 2**20} MiB" if n >= 2**20 else f"{n // 2**10} KiB"

    table = Table(
        "bytes of a call", "one array, GB/s", f"{PUT_LIST} arrays, GB/s", "one array, us", title="host to device"
    )
    cells = {(p.nbytes, p.arrays): p for p in puts}
    for nbytes in sorted({p.nbytes for p in puts}):
        row = [cells.get((nbytes, count)) for count in (1, PUT_LIST)]
        one = f"{1e6 * row[0].seconds:.0f}" if row[0] else ""
        table.add_row(size(nbytes), *(rate(p.bytes_per_s) if p else "" for p in row), one)
    console.print(table)

    names = {"before": "before compute", "after": "after compute", "thread": "by a thread"}
    table = Table(
        "compute",
        "copy alone, ms",
        "compute alone, ms",
        *names.values(),
        title="share of a copy that is hidden, by how it is issued",
    )
    for compute in dict.fromkeys(o.compute for o in overlaps):
        row = {o.how: o for o in overlaps if o.compute == compute}
        alone = (f"{1e3 * s:.2f}" for s in (row["before"].copy_s, row["before"].compute_s))
        table.add_row(f"{compute}-bound", *alone, *(f"{row[how].hidden:.2f}" for how in names))
    console.print(table)

    table = Table("bytes of a read", *(f"{n} threads, GB/s" for n in THREADS), title="random reads from disk")
    for nbytes in dict.fromkeys(r.slice_bytes for r in reads):
        table.add_row(size(nbytes), *(rate(r.bytes_per_s) for r in reads if r.slice_bytes == nbytes))
    console.print(table)
    print("weights read by a matrix-vector product: " + ", ".join(f"{k} {rate(v)} GB/s" for k, v in matvecs.items()))


if __name__ == "__main__":
    cli.run(main)

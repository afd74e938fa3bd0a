"""Converts a Hugging Face checkpoint once, so that experts can be mapped, read aligned, and take less room.

    python convert.py --checkpoint=HF_DIR --output=DIR                          the same weights, to the bit
    python convert.py --checkpoint=HF_DIR --output=DIR --quantization=packed    12 bits for bfloat16, without loss
    python convert.py --checkpoint=HF_DIR --output=DIR --quantization=int4      experts in 4.5 bits a weight
    python convert.py --checkpoint=HF_DIR --output=DIR --quantization=int8 --compare=TEXT_FILE

Then: python infer.py --config.checkpoint=DIR. A killed conversion goes on when the same command is given again.
"""

import sys
import time
from pathlib import Path

from absl import flags

from moe_jax import cli
from moe_jax.errors import UserError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Hugging Face directory (or a converted one).")
OUTPUT = flags.DEFINE_string("output", None, "Directory to write; new, or that of an interrupted conversion.")
QUANTIZATION = flags.DEFINE_string(
    "quantization", "none", "Of the experts: none, bf16, packed (bfloat16 in 12 bits, without loss), int8 or int4."
)
COMPARE = flags.DEFINE_multi_string("compare", [], "Text on which to compare predictions with the source; repeatable.")

WINDOW = 256  # tokens of context in which predictions are compared


def main() -> None:
    checkpoint, output = (needed(flag) for flag in (CHECKPOINT, OUTPUT))

    from moe_jax.checkpoint.convert import convert
    from moe_jax.checkpoint.converted import open_checkpoint

    source = open_checkpoint(checkpoint)
    texts = read_texts(source) if COMPARE.value else {}
    began = time.perf_counter()
    with progress() as report:
        converted = convert(source, output, QUANTIZATION.value, report)
    a = converted.architecture
    experts = a.num_moe_layers * a.num_experts
    print(
        f"{output}: {experts} experts of {converted.expert_bytes / 1e6:.4g} MB"
        f" ({source.expert_bytes / 1e6:.4g} MB in the source), {time.perf_counter() - began:.1f} s"
    )
    if texts:
        compare(source, converted, texts)
    print(f"Run it with: python infer.py --config.checkpoint={output}")


def needed(flag) -> str:
    if not flag.value:
        raise UserError(f"--{flag.name}=DIR is needed; see --help")
    return flag.value


def read_texts(source) -> dict[str, list[int]]:
    """Tokens of the texts to compare on, by file; what is wrong with them is said before the conversion."""
    from moe_jax.inference.text import Tokenizer

    tokenizer, least, texts = Tokenizer(source.directory), min(WINDOW, source.architecture.max_seq_len), {}
    for name in COMPARE.value:
        try:
            text = Path(name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            raise UserError(f"--compare={name}: no such file") from None
        except OSError as error:
            raise UserError(f"--compare={name} cannot be read ({error.strerror}); give a text file") from None
        texts[name] = tokenizer.encode(text)
        if len(texts[name]) < least:
            raise UserError(f"--compare={name} has {len(texts[name])} tokens; give a text of at least {least}")
    return texts


def compare(source, converted, texts: dict[str, list[int]]) -> None:
    """Prints what quantisation costs on the given texts."""
    from rich.console import Console
    from rich.table import Table

    from moe_jax.evaluation import agreement

    table = Table("text", "tokens", "KL, nats per token", "perplexity: source", "converted", "same first choice")
    for name, ids in texts.items():
        with cli.status(f"comparing on {name}"):
            r = agreement.compare(source, converted, ids, WINDOW)
        kl = round(r.kl, 5) + 0  # no -0.00000
        row = f"{kl:.5f}", f"{r.perplexity_reference:.4f}", f"{r.perplexity:.4f}", f"{100 * r.same_choice:.2f}%"
        table.add_row(Path(name).name, str(r.tokens), *row)
    console = Console()
    Console(width=None if console.is_terminal else max(console.width, 110)).print(table)


class progress:
    """What the conversion reports to: a bar on a terminal, elsewhere a line for every tenth. On stderr."""

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._bar = Progress("converting", *columns, console=console) if console.is_terminal else None
        self._tenth = 0
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("converting")
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
        elif 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            print(f"converting: {done / 1e6:.1f} of {total / 1e6:.1f} MB", file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()


if __name__ == "__main__":
    cli.run(main)

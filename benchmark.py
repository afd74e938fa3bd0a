"""Compares ways to run one model, interleaved in one process, with the bounds beside the result.

    python benchmark.py --config=configs/mixtral.py
    python benchmark.py --config=configs/mixtral.py --modes=resident,none,learned --config.offload.device_budget=50%

A mode is `resident` (every expert on the device), or a predictor (`none` is LRU on demand, the yardstick).
"""

import dataclasses
import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from moe_jax import cli
from moe_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", "configs/mixtral.py", "Model, offload and prefetch configuration.")
MODES = flags.DEFINE_list("modes", "resident,none,repeat,router,learned", "What to compare.")
PROMPT = flags.DEFINE_multi_string("prompt", ["def main(argv):\n    "], "Prompts of the batch.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "Tokens of each run.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Runs of each mode, in turn, after one to warm up.")
INFLATE = flags.DEFINE_integer("inflate", None, "Run a copy with experts so wide: same text, experts of megabytes.")
INFLATE_FOLDER = flags.DEFINE_string("inflate_folder", None, "Where inflated copies are kept; default: the user cache.")
OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write the rows to this file.")


def main() -> None:
    from moe_jax.config import Config
    from moe_jax.evaluation import speed
    from moe_jax.inference.session import Model

    if OUTPUT_JSON.value and not Path(OUTPUT_JSON.value).absolute().parent.is_dir():
        raise UserError(f"--output_json={OUTPUT_JSON.value}: its folder does not exist")
    config = Config.from_dict(CONFIG.value.to_dict())
    if INFLATE.value is not None:
        config = inflate(config, INFLATE.value)
    with cli.status("loading the model"):
        model = Model(config)
    with cli.status(f"{REPEATS.value + 1} runs of {', '.join(MODES.value)}"):
        rows = speed.compare(model, MODES.value, PROMPT.value, MAX_NEW_TOKENS.value, REPEATS.value)
    show(rows, model.config.offload.link_gbps > 0)
    if OUTPUT_JSON.value:
        Path(OUTPUT_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")
    model.close()


def inflate(config, width: int):
    """The same configuration, of a copy of its model inflated to this expert hidden width."""
    from moe_jax.evaluation.inflate import cache_folder, inflated
    from moe_jax.inference.session import shipped

    source, folder = config.checkpoint or shipped("model"), INFLATE_FOLDER.value or cache_folder()
    with cli.status(f"inflating {source} into {folder}"):
        _, bank = inflated(source, width, folder)
    predictor = config.prefetch.checkpoint or ("" if config.checkpoint else str(shipped("predictor")))
    prefetch = dataclasses.replace(config.prefetch, checkpoint=predictor)
    return dataclasses.replace(config, checkpoint=str(bank), prefetch=prefetch)


def show(rows: list[dict], simulated: bool) -> None:
    """One line per mode."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Times over a simulated link" if simulated else None)
    for column in ("mode", "TPOT", "to LRU (95%)", "hits", "recall", "MB/token", "stall", "max(C,T)", "C+T", "overlap"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    ms = lambda s: "-" if s is None else f"{1e3 * s:.2f} ms"
    pct = lambda x: "-" if x is None else f"{100 * x:.1f}%"
    for row in rows:
        moved, ratio = [b for b in row["bytes_per_token"].values() if b is not None], row["ratio_to_lru"]
        table.add_row(
            row["mode"],
            ms(row["tpot_s"]["median"]),
            "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
            pct(row["hit_rate"]),
            pct(row["recall"]),
            f"{sum(moved) / 1e6:.2f}" if moved else "-",
            ms(row["stall_s_per_token"]),
            ms(row["bound_overlap_s"]),
            ms(row["bound_serial_s"]),
            "-" if row["overlap_share"] is None else f"{row['overlap_share']:.2f}",
        )
    console = Console()
    Console(width=max(console.width, 120) if not console.is_terminal else None).print(table)
    for row in rows:
        if row["host_overhead_s_per_layer"] is not None:
            overhead = 1e6 * row["host_overhead_s_per_layer"]
            print(f"host overhead, resident: {overhead:.0f} us per layer (replay {ms(row['replay_s'])} per token)")


if __name__ == "__main__":
    cli.run(main)

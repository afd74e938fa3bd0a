"""What execution modes cost in quality, and what they gain: every mode with every predictor in one table.

    python evaluate.py --config=configs/mixtral.py                        the shipped model and test texts
    python evaluate.py --config.checkpoint=DIR --text=FILE --text=FILE    another model, other texts
    python evaluate.py --predictors=router,learned --plot=FILE            FILE.png and FILE.svg of the trade-off
    python evaluate.py --measure_recall --config.prefetch.checkpoint=DIR  what `hybrid` needs, once per predictor

Perplexity, agreement and KL are of texts read token by token through decode steps, where modes act; times and bytes are
of greedy generations of one prompt at a time, which take turns. See `moe_jax/inference/execution.py` for the modes.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from moe_jax import cli, outputs
from moe_jax.analysis import pareto
from moe_jax.errors import UserError

MODES = ("exact", "speculative", "speculative_gated", "hybrid", "cache_aware")

CONFIG = cli.config_flag("configs/mixtral.py", "Model, offload and prefetch configuration.")
TEXT = flags.DEFINE_multi_string("text", [], "File to read; repeatable. Default: the shipped test texts.")
CHOSEN = flags.DEFINE_list("modes", list(MODES), "Execution modes; exact is always there. Default: all that can run.")
PREDICTORS = flags.DEFINE_list(
    "predictors", ["none", "router", "learned"], "Predictors to run each mode with. Default: those that there are."
)
TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens to read of each text, from its start.")
WINDOW = flags.DEFINE_integer("window", 256, "Tokens of context: texts are cut into windows of so many.")
ROWS = flags.DEFINE_integer("rows", 16, "Windows that decode together, a power of two.")
PROMPTS = flags.DEFINE_integer("prompts", 2, "Prompts of each text to continue, for times and bytes.")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Tokens to generate after each.")
MEASURE_RECALL = flags.DEFINE_bool(
    "measure_recall", False, "Measure how well each layer is predicted on --text, and store it with the predictor."
)
OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write everything to this file.")
PLOT = flags.DEFINE_string("plot", None, "Write the trade-off as a picture to PLOT.png and PLOT.svg.")

PROMPT_TOKENS = 48


def main() -> None:
    for field, flag in (("execution", CHOSEN), ("prefetch.predictor", PREDICTORS)):
        if field in config_flags.get_override_values(flags.FLAGS[CONFIG.name]):
            raise UserError(f"--config.{field} is what is compared here: name what to run with --{flag.name}")
    unused = [flag.name for flag in (CHOSEN, PROMPTS, NEW_TOKENS, OUTPUT_JSON, PLOT) if flag.present]
    if MEASURE_RECALL.value and unused:
        raise UserError(f"--measure_recall compares no modes, and stores with the predictor; leave out --{unused[0]}")
    if OUTPUT_JSON.value:
        outputs.check("output_json", OUTPUT_JSON.value)
    for suffix in pareto.SUFFIXES if PLOT.value else ():
        outputs.check("plot", f"{PLOT.value}.{suffix}")
    if not CHOSEN.value:
        raise UserError(f"--modes is empty; give some of {', '.join(MODES)}")
    if unknown := set(CHOSEN.value) - set(MODES):
        raise UserError(f"--modes: {', '.join(sorted(unknown))} is not among {', '.join(MODES)}")
    if ROWS.value < 1 or ROWS.value & (ROWS.value - 1):
        raise UserError(f"--rows={ROWS.value} must be a power of two")
    if not PREDICTORS.value or "oracle" in PREDICTORS.value:
        raise UserError("--predictors names at least one, and not the oracle: it replays one recorded request")
    if WINDOW.value < 3 or TOKENS.value < WINDOW.value or PROMPTS.value < 1 or NEW_TOKENS.value < 2:
        raise UserError("--window must be at least 3, --tokens a window, --prompts 1, --new_tokens 2")
    if PLOT.value:
        pareto.check()

    from moe_jax.config import Config
    from moe_jax.evaluation import quality
    from moe_jax.inference.session import Model

    config = Config.from_dict(CONFIG.value.to_dict())
    # What the configuration itself would run is beside the point; it must only load.
    config = dataclasses.replace(
        config, execution="exact", prefetch=dataclasses.replace(config.prefetch, predictor="none")
    )
    with cli.status("loading the model"):
        model = Model(config)
    if WINDOW.value > model.engine.max_seq_len:
        raise UserError(f"--window={WINDOW.value} is more than the {model.engine.max_seq_len} positions of the model")
    texts = read_texts(model)
    windows = {name: cut(ids) for name, ids in texts.items()}
    rows = ROWS.value
    steps = sum(-(-len(w) // rows) * rows * WINDOW.value for w in windows.values())
    if MEASURE_RECALL.value:
        measure_recall(model, windows, steps)
        return
    prompts = prompts_of(model, texts)
    names, unmeasured = available(model)
    chosen = quality.ways(model, CHOSEN.value, names, rows, unmeasured)
    distinct = list({way.reads_like: way for way in chosen}.values())
    by_text, done = {}, 0
    with cli.progress(
        f"reading {sum(w.size for w in windows.values()):,} tokens in {len(distinct)} ways", steps
    ) as advance:
        for name, part in windows.items():
            found = quality.read(distinct, part, rows, lambda n, done=done: advance(done + n))
            by_text[name] = dict(zip([way.reads_like for way in distinct], found, strict=True))
            done += -(-len(part) // rows) * rows * WINDOW.value
    with cli.progress(f"continuing {len(prompts)} prompts", (len(prompts) + 1) * len(chosen)) as advance:
        speeds = quality.generate(model, chosen, prompts, NEW_TOKENS.value, advance)
    table = [
        quality.row(way, {name: found[way.reads_like] for name, found in by_text.items()}, speed)
        for way, speed in zip(chosen, speeds, strict=True)
    ]
    print_table(table)
    if OUTPUT_JSON.value:
        document = {
            "config": dataclasses.asdict(config),
            "texts": {name: int(part.size) for name, part in windows.items()},
            "window": WINDOW.value,
            "new_tokens": NEW_TOKENS.value,
            "ways": table,
        }
        outputs.write_json(OUTPUT_JSON.value, document)
    if PLOT.value:
        pareto.plot(table, PLOT.value)
    model.close()


def available(model) -> tuple[list, set]:
    """Predictors to run, and those that `hybrid` is left out for, where the user has not chosen."""
    from moe_jax.prediction import recall_file
    from moe_jax.prediction.interface import fingerprint

    directory, names = model.predictor_directory(), list(PREDICTORS.value)
    if not directory and not PREDICTORS.present:
        names = ["none", "router"]
        print("predictors: none, router; for more train_predictor.py and --config.prefetch.checkpoint", file=sys.stderr)
    if CHOSEN.present:
        if names == ["none"] and set(CHOSEN.value) <= {"speculative", "speculative_gated", "hybrid"}:
            raise UserError(
                f"--modes={','.join(CHOSEN.value)} run what is predicted; name a predictor with --predictors"
            )
        return names, set()
    identity = fingerprint(model.checkpoint.architecture, model.engine.dense)
    unmeasured = {n for n in names if n != "none" and recall_file.stored(directory, identity, n) is None}
    if unmeasured:
        print(
            f"hybrid is left out for {', '.join(sorted(unmeasured))}: it needs evaluate.py --measure_recall"
            " --config.prefetch.checkpoint=DIR",
            file=sys.stderr,
        )
    return names, unmeasured


def read_texts(model) -> dict:
    """Token ids of each text, by file name."""
    import numpy as np

    from moe_jax.inference.session import shipped

    folder, pattern = ("development", "*.txt") if MEASURE_RECALL.value else ("held_out", "held_out_*.txt")
    names = TEXT.value or sorted(map(str, shipped(folder).glob(pattern)))
    if not names:
        raise UserError("no texts are shipped; name one with --text=FILE")
    found = {}
    for name in names:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text={name}: cannot be read as UTF-8 text ({error})") from None
        ids = np.array(model.tokenizer.encode(text), np.int32)[: TOKENS.value]
        if len(ids) < WINDOW.value:
            raise UserError(f"--text={name} has {len(ids)} tokens; give at least --window={WINDOW.value}")
        if Path(name).stem in found:
            raise UserError(f"--text={name}: another text has this name already; rename one of them")
        found[Path(name).stem] = ids
    return found


def cut(ids):
    """Whole windows [W, T]; what is left over is not used."""
    return ids[: len(ids) // WINDOW.value * WINDOW.value].reshape(-1, WINDOW.value)


def prompts_of(model, texts: dict) -> list[str]:
    """--prompts pieces of each text, evenly spread, none overlapping another."""
    count, prompts = PROMPTS.value, []
    for name, ids in texts.items():
        if count > (most := max(1, len(ids) // PROMPT_TOKENS)):
            raise UserError(
                f"--prompts={count}: the {len(ids)} tokens read of {name} hold {most} of {PROMPT_TOKENS} tokens;"
                f" give --prompts={most}, or more --tokens of a longer text"
            )
        starts = range(0, count * (len(ids) // count), len(ids) // count)
        prompts += [model.tokenizer.decode(ids[start : start + PROMPT_TOKENS].tolist()) for start in starts]
    positions, longest = model.engine.max_seq_len, max(len(model.tokenizer.encode(prompt)) for prompt in prompts)
    if NEW_TOKENS.value > (room := positions + 1 - longest):  # the last token generated is never entered
        raise UserError(
            f"--new_tokens={NEW_TOKENS.value} is more than the {positions} positions leave after prompts of {longest}"
            f" tokens; give at most {room}"
        )
    return prompts


def measure_recall(model, windows: dict, steps: int) -> None:
    """Recall by layer of every predictor, stored with the predictor for `hybrid`."""
    import numpy as np

    from moe_jax.evaluation import quality
    from moe_jax.prediction import recall_file
    from moe_jax.prediction.interface import fingerprint

    directory = model.predictor_directory()
    if not directory or not Path(directory).is_dir():
        raise UserError("recall is stored with a trained predictor; name its folder with --config.prefetch.checkpoint")
    outputs.check_folder(f"--config.prefetch.checkpoint={directory}", Path(directory))
    part, recall = np.concatenate(list(windows.values())), {}
    names = [name for name in PREDICTORS.value if name != "none"]
    for name in names:  # one that cannot be loaded is better known before minutes of measurement than after
        model.predictor(name, model.engine.dense)
    for name in names:
        with cli.progress(f"recall of {name}", steps) as advance:
            recall[name] = quality.recall_by_layer(model, name, part, ROWS.value, advance)
        print(name, " ".join("-" if r is None else f"{100 * r:.1f}%" for r in recall[name]))
    identity = fingerprint(model.checkpoint.architecture, model.engine.dense)
    recall_file.store(directory, identity, recall, list(windows))
    print(f"stored in {directory}")
    model.close()


def print_table(table: list) -> None:
    """One line for each way."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="quality: texts through decode steps; the rest: greedy generations, one prompt at a time")
    pct = lambda x: "-" if x is None else f"{100 * x:.1f}%"
    headings = (
        "mode",
        "predictor",
        "perplexity",
        "over exact",
        "same choice",
        "KL",
        "departed",
        "same text",
        "TPOT ms",
    )
    for heading in (*headings, "hit rate", "waited MB", "demand MB", "speculative MB"):
        shown.add_column(heading, justify="left" if heading in ("mode", "predictor") else "right", no_wrap=True)
    for way in table:
        q, s = way["quality"], way["speed"]
        shown.add_row(
            way["mode"],
            way["predictor"],
            f"{q['perplexity']:.3f}",
            f"{100 * (q['perplexity_ratio'] - 1):+.2f}%",
            pct(q["same_choice"]),
            f"{q['kl']:.4f}",
            pct(q["departed"]),
            f"{s['agreement']:.1f}/{s['new_tokens']:.1f}",
            f"{1e3 * s['tpot_s']:.2f}",
            pct(s["hit_rate"]),
            *(f"{s[name] / 1e6:.3f}" for name in ("waited_bytes", "demand_bytes", "speculative_bytes")),
        )
    console = Console()
    Console(width=max(console.width, 180) if not console.is_terminal else None).print(shown)


if __name__ == "__main__":
    cli.run(main)

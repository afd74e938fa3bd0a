"""Compares ways to run one model, interleaved in one process, with the bounds beside the result.

    python benchmark.py --config=configs/mixtral.py
    python benchmark.py --config=configs/mixtral.py --modes=resident,lru,learned,oracle --budgets=min,25%,50%,100%
    python benchmark.py --config=configs/mixtral.py --inflate=4680 --output_json=speed.json --plot=speed

`--modes` takes `resident` (every expert on the device), `lru` (on demand, the yardstick) or another eviction policy, a
predictor, PREDICTOR+POLICY, `oracle`, `no_cache`, `paper` (the method of arXiv 2603.19289, exact), most of them also as
MODE@arrival (experts widened to the compute dtype in the budget). A table for every budget, batch and prompt length.
T is what LRU on demand loads, read by an independent reader; C is the same computation with everything resident.

    python benchmark.py --config=configs/mixtral.py --peers --inflate=7000 --budgets=300MB

`--peers` races llama.cpp, `accelerate` and `transformers` on the same weights, each alone under one memory cap.
"""

import dataclasses
import re
import sys
from pathlib import Path

from absl import flags

from moe_jax import cli, outputs
from moe_jax.errors import UserError

CONFIG = cli.config_flag("configs/mixtral.py", "Model, offload and prefetch configuration.")
MODES = flags.DEFINE_list("modes", "resident,lru,repeat,router,learned", "What to compare. Default: what can run.")
BUDGETS = flags.DEFINE_list("budgets", None, "Device budgets, each as --config.offload.device_budget or `min`.")
BATCHES = flags.DEFINE_list("batches", "1", "Numbers of prompts that decode together.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; repeatable. Default: text held out of the shipped model.")
PROMPT_LENGTHS = flags.DEFINE_list("prompt_lengths", None, "Tokens of each prompt, cut from the texts.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens of each run.", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 6, "Runs of each mode, in turn.", lower_bound=2)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "How texts are continued: 0 is greedy, and small models then repeat themselves."
)
INFLATE = flags.DEFINE_integer("inflate", None, "Run a copy with experts so wide: same text, experts of megabytes.")
INFLATE_FOLDER = flags.DEFINE_string("inflate_folder", None, "Where inflated copies are kept; default: the user cache.")
OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write every figure to this file.")
PEERS = flags.DEFINE_bool("peers", False, "Race other engines instead; --budgets are ours, within the cap.")
PEERS_CAP = flags.DEFINE_string("peers_cap", "40%", "Memory of every contender: bytes, or a share of the model's.")
PEERS_FOLDER = flags.DEFINE_string(
    "peers_folder", None, "Where peers' copies of the model go; default: the user cache."
)
PEERS_ROUNDS = flags.DEFINE_integer("peers_rounds", 1, "Runs of each contender, in turn.", lower_bound=1)
PLOT = flags.DEFINE_string("plot", None, "Draw TPOT against the budget into PLOT.png and PLOT.svg.")


def main() -> None:
    from moe_jax.config import Config

    if OUTPUT_JSON.value:
        outputs.check("output_json", OUTPUT_JSON.value)
    for suffix in ("png", "svg") if PLOT.value else ():
        outputs.check("plot", f"{PLOT.value}.{suffix}")
    batches, lengths = numbers(BATCHES), numbers(PROMPT_LENGTHS) if PROMPT_LENGTHS.value else [None]
    plot = None
    if PLOT.value:  # what is missing is better said before the measurement
        from moe_jax.analysis import budget_plot as plot

        plot.require()
    config = Config.from_dict(CONFIG.value.to_dict())
    if config.execution != "exact":
        raise UserError(
            f"config.execution={config.execution!r}: benchmark.py compares ways of exact execution; leave it out, or"
            f" give python evaluate.py --modes={config.execution}"
        )
    if PEERS.value:
        if unused := [flag.name for flag in (PLOT, BATCHES, REPEATS) if flag.present]:
            raise UserError(f"--peers races with one prompt, --peers_rounds times; leave out --{unused[0]}")
        if TEMPERATURE.value:
            raise UserError("--peers compares the tokens of greedy texts; leave --temperature at 0")
        from moe_jax.evaluation.peers.race import require

        require()
        if INFLATE.value is None:
            raise UserError("--peers races on an inflated model, of which every format is made: give --inflate=WIDTH")
    names = available(config)
    modes = [] if PEERS.value else parse(config, names)  # before a copy is written
    if INFLATE.value is not None:
        config = inflate(config, INFLATE.value)
    if PEERS.value:
        document = {"command": " ".join(["python", *sys.argv]), **race(config, names)}
        if OUTPUT_JSON.value:
            outputs.write_json(OUTPUT_JSON.value, document)
        return
    document = {
        "command": " ".join(["python", *sys.argv]),
        "config": dataclasses.asdict(config),
        "temperature": TEMPERATURE.value,
        "simulated_link_gbps": config.offload.link_gbps or None,
        "runs": measure(config, modes, batches, lengths),
    }
    if OUTPUT_JSON.value:
        outputs.write_json(OUTPUT_JSON.value, document)
    if plot:
        for file in plot.draw([document], Path(PLOT.value or "")):
            print(f"wrote {file}")


def available(config) -> list[str]:
    """Names of the modes: those that the user has chosen; otherwise those that there are."""
    from moe_jax.prediction.predictors import TRAINED

    absent = [name for name in MODES.value if re.split("[+@]", name)[0] in TRAINED]
    if config.prefetch.checkpoint or not config.checkpoint or not absent:
        return MODES.value
    how = "train_predictor.py and --config.prefetch.checkpoint"
    if MODES.present:
        raise UserError(f"--modes: {absent[0]} needs a predictor trained for this model: {how}; or leave it out")
    names = [name for name in MODES.value if name not in absent]
    say(f"modes: {', '.join(names)}; for {', '.join(absent)} {how}")
    return names


def parse(config, names: list[str]) -> list:
    """The modes of these names."""
    from moe_jax.checkpoint.converted import open_checkpoint
    from moe_jax.config import choices
    from moe_jax.evaluation import modes
    from moe_jax.inference.session import shipped

    return modes.parse(
        names,
        choices("prefetch.predictor"),
        choices("offload.policy"),
        choices("offload.upcast"),
        open_checkpoint(config.checkpoint or shipped("model")).architecture.top_k,
        bool(config.prefetch.checkpoint or not config.checkpoint),
    )


def measure(config, modes: list, batches, lengths) -> list[dict]:
    """Every table, printed as soon as it is there."""
    from moe_jax.evaluation import plan, speed
    from moe_jax.evaluation.lab import Lab
    from moe_jax.evaluation.texts import prompt_ids
    from moe_jax.inference.sampling import Sampling

    config, modes, budgets = plan.settle(config, modes, bool(MODES.present), BUDGETS.value or [], say)
    with cli.status("loading the model"):
        resident = any(mode.resident for mode in modes)
        lab = Lab(config, resident, MAX_NEW_TOKENS.value, Sampling(TEMPERATURE.value))
    for name in {mode.predictor for mode in modes}:  # one that cannot be loaded is better known now
        lab.model.predictor(name, lab.model.engine.dense)
    runs = []
    for batch in batches:
        for length in lengths:
            sets = prompt_ids(lab.model.tokenizer, PROMPT.value, batch, length, REPEATS.value)
            requests = []
            with cli.progress(f"rehearsing {len(sets)} requests of {batch} prompts", len(sets)) as advance:
                for prompts in sets:
                    requests.append(lab.rehearse(prompts))
                    advance(len(requests))
            for i, (text, budget) in enumerate(budgets.items()):
                here = [mode for mode in modes if mode.experts is None or not i]  # a budget of their own: once
                turns, runs_each = REPEATS.value, len(here) + 1  # the bounds are measured too
                with cli.progress("warming up", runs_each) as advance:
                    speed.compare(lab, here, requests[:1], budget, 1, advance)
                title = f"{turns} turns of {', '.join(mode.name for mode in here)} at {text}"
                with cli.progress(title, turns * runs_each) as advance:
                    run = {"budget": text, **speed.compare(lab, here, requests, budget, turns, advance)}
                show(run, config.offload.link_gbps)
                runs.append(run)
    lab.close()
    return runs


def say(what: str) -> None:
    """A line on stderr."""
    print(what, file=sys.stderr, flush=True)


def numbers(flag) -> list[int]:
    """The positive integers of a list flag."""
    try:
        values = [int(value) for value in flag.value]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UserError(f"--{flag.name}={','.join(flag.value)}: give positive integers, as in --{flag.name}=1,4")
    return values


def inflate(config, width: int):
    """The same configuration, of a copy of its model inflated to this expert hidden width."""
    from moe_jax.evaluation.inflate import cache_folder, inflated
    from moe_jax.inference.session import shipped

    source, folder = config.checkpoint or shipped("model"), INFLATE_FOLDER.value or cache_folder()
    with cli.progress(f"inflating {source} into {folder}, %", 100) as advance, outputs.room(folder):
        _, bank = inflated(source, width, folder, lambda done, total: advance(100 * done // total))
    predictor = config.prefetch.checkpoint or ("" if config.checkpoint else str(shipped("predictor")))
    prefetch = dataclasses.replace(config.prefetch, checkpoint=predictor)
    return dataclasses.replace(config, checkpoint=str(bank), prefetch=prefetch)


def race(config, names: list[str]) -> dict:
    """The race against other engines: prints its table, and returns everything."""
    from moe_jax.evaluation.inflate import cache_folder
    from moe_jax.evaluation.peers import race as races
    from moe_jax.evaluation.peers import report
    from moe_jax.evaluation.texts import prompt_ids
    from moe_jax.inference.text import Tokenizer
    from moe_jax.offload.source import parse_budget

    bank = Path(config.checkpoint)
    released = bank.with_name(bank.name.removesuffix("-bank") + "-hf")  # as `inflated` names them
    folder = Path(PEERS_FOLDER.value or cache_folder().parent / "peers") / released.name
    size = sum(file.stat().st_size for file in released.glob("*.safetensors"))
    cap = parse_budget(PEERS_CAP.value, size, flag="--peers_cap")
    tokenizer = Tokenizer(bank)
    length = numbers(PROMPT_LENGTHS)[0] if PROMPT_LENGTHS.value else None
    prompt = tokenizer.decode(prompt_ids(tokenizer, PROMPT.value, 1, length, 1)[0][0])
    with cli.status(f"preparing the formats of the peers in {folder}"), outputs.room(folder):
        entered = races.contenders(
            races.Entry(released, bank, folder, prompt, tokenizer.encode(prompt), MAX_NEW_TOKENS.value),
            BUDGETS.value or [config.offload.device_budget],
            ["none", *(name for name in names if name not in ("resident", "lru"))],
            config.prefetch.checkpoint,
        )
    results = races.race(*entered, cap, PEERS_ROUNDS.value, say)
    document = report.document(results, cap, size)
    print(report.text(document))
    return document


def show(run: dict, link_gbps: float) -> None:
    """One line per mode, and the bounds under them."""
    from rich.console import Console
    from rich.table import Table

    simulated = f", over a *simulated* link of {link_gbps:g} GB/s" if link_gbps else ""
    title = (
        f"budget {run['budget']}: {run['experts_in_budget']} experts of {run['expert_bytes'] / 1e6:.2f} MB"
        f" ({100 * run['budget_share']:.3g}% of all); batch {run['batch']}, prompts of {run['prompt_length']} tokens,"
        f" {run['turns']} turns{simulated}"
    )
    table = Table(title=title, title_justify="left")
    columns = ("mode", "TPOT", "p50 / p99", "to LRU (95%)", "hits", "recall", "MB/token", "to Belady", "stall", "TTFT")
    for column in (*columns, "overlap", "of machine's (95%)", "wasted/idle", "peak MB"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    ms = lambda s: "-" if s is None else f"{1e3 * s:.2f}"
    pct = lambda x: "-" if x is None else f"{100 * x:.1f}%"
    number = lambda x: "-" if x is None else f"{x:.2f}"
    spread = lambda x: "-" if x is None else f"{x['value']:.3f} ({x['low']:.3f}-{x['high']:.3f})"
    for row in run["modes"]:
        moved, peak = row["bytes_per_token"], row["peak_device_cache_bytes"]
        table.add_row(
            row["name"],
            ms(row["tpot_s"]["mean"]),
            f"{ms(row['tpot_s']['median'])} / {ms(row['tpot_s']['p99'])}",
            spread(row["ratio_to_lru"]),
            pct(row["hit_rate"]),
            pct(row["recall"]),
            f"{sum(moved.values()) / 1e6:.2f}" if moved else "-",
            number(row["loads_to_belady"]),
            ms(row["stall_s_per_token"]),
            f"{1e3 * row['ttft_s']:.0f}",
            number(row["overlap_share"]),
            spread(row["overlap_of_machine"]),
            pct(row["wasted_of_idle"]),
            "-" if peak is None else f"{peak / 1e6:.1f}",
        )
    console = Console()
    Console(width=max(console.width, 190) if not console.is_terminal else None).print(table)
    b = run["bounds"]
    rate = "-" if b["reader_bytes_per_s"] is None else f"{b['reader_bytes_per_s'] / 1e9:.2f} GB/s"
    print(
        f"times in ms per token. C {ms(b['compute_s'])}{'' if b['every_expert_resident'] else ' (few experts)'},"
        f" T {ms(b['transfer_s'])} ({rate} at depth {b['reader_depth']}), max(C, T) {ms(b['bound_overlap_s'])},"
        f" C + T {ms(b['bound_serial_s'])}; both at once {ms(b['machine_s'])}, which is an overlap of"
        f" {number(b['machine_overlap_share'])}. Loads per token: LRU {b['lru_loads_per_token']:.2f},"
        f" Belady's optimum {b['belady_loads_per_token']:.2f};"
        f" knowing all experts of the next {', '.join(b['loads_per_token_seeing'])} tokens"
        f" {', '.join(f'{loads:.2f}' for loads in b['loads_per_token_seeing'].values())}\n"
    )


if __name__ == "__main__":
    cli.run(main)

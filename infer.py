"""Generates text with a Mixture-of-Experts model whose experts do not fit on the device.

    python infer.py --config=configs/mixtral.py                             the shipped model, experts in host memory
    python infer.py --config=configs/mixtral.py --config.checkpoint=DIR     a Hugging Face directory, e.g. Mixtral-8x7B,
                                                                            or one that convert.py made of it
    python infer.py --config=configs/mixtral.py --prompt="def main(" --config.prefetch.predictor=router

Any field of the configuration can be set as --config.FIELD=VALUE.
"""

import dataclasses
import itertools
import select
import sys
from pathlib import Path

from absl import flags

from moe_jax import cli, outputs
from moe_jax.errors import LoadError, UserError

CONFIG = cli.config_flag("configs/mixtral.py", "Model, offload and prefetch configuration.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; repeat the flag to generate for several as one batch.")
PROMPT_FILE = flags.DEFINE_multi_string("prompt_file", [], "A file whose whole text is one prompt; repeatable.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Most tokens to generate for each prompt.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most probable tokens; 0 is off.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample in the nucleus of this probability; 1 is off.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.", lower_bound=-(2**63), upper_bound=2**63 - 1)
CHAT = flags.DEFINE_bool("chat", False, "Treat prompts as user messages, with the checkpoint's chat template.")
SYSTEM = flags.DEFINE_string("system", "", "System message, with --chat.")
OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write outputs and metrics to this file.")
TRACE = flags.DEFINE_string("trace", None, "Write everything that happened, as JSON lines, to this file.")
REPORT = flags.DEFINE_string("report", None, "Write a report by layer, in Markdown, to this file.")

DEFAULT_PROMPTS = ["And the LORD said unto", "def read_file(path):\n"]


def main() -> None:
    written = {flag.name: flag.value for flag in (OUTPUT_JSON, TRACE, REPORT) if flag.value}
    for name, file in written.items():
        outputs.check(name, file)
    for (one, file), (other, same) in itertools.combinations(written.items(), 2):
        if Path(file).resolve() == Path(same).resolve():
            raise UserError(f"--{one} and --{other} are both {same}; give each a file of its own")
    if SYSTEM.value and not CHAT.value:
        raise UserError("--system needs --chat")
    prompts, chosen = read_prompts()  # may wait for them

    from moe_jax.config import Config
    from moe_jax.inference.sampling import Sampling
    from moe_jax.inference.session import Model

    config = Config.from_dict(CONFIG.value.to_dict())
    # Small models repeat themselves under greedy decoding; what we show unasked is sampled.
    temperature = TEMPERATURE.value if chosen or TEMPERATURE.present else 0.6
    sampling = Sampling(temperature, TOP_K.value, TOP_P.value, SEED.value)
    if config.offload.tier == "none" and (TRACE.value or REPORT.value):
        raise UserError("--trace and --report tell of transfers and need --config.offload.tier=host or disk")
    with cli.status("loading the model"):
        model = Model(config)
    describe(model, chosen)
    with cli.status("compiling (the second run reads the compilation cache)"):
        generation = model.start(prompts, MAX_NEW_TOKENS.value, sampling, SYSTEM.value if CHAT.value else None)
    if TRACE.value or REPORT.value:
        from moe_jax.trace import Trace

        generation.trace = Trace()  # with every step and load
    ended = stream(generation)
    with cli.status("measuring the bounds"):
        metrics = model.metrics(generation, bounds=not isinstance(ended, LoadError))
    print_table(metrics, config.offload.link_gbps > 0)
    if OUTPUT_JSON.value:
        texts = [vars(output) for output in generation.outputs]
        document = {"config": dataclasses.asdict(model.config), "outputs": texts, "metrics": metrics}
        outputs.write_json(OUTPUT_JSON.value, document)
    if TRACE.value:
        with outputs.writing(TRACE.value) as file:
            generation.trace.save(file)
    if REPORT.value:
        from moe_jax.analysis import report

        with outputs.writing(REPORT.value) as file:
            file.write_text(report.markdown(generation.trace))
    model.close()
    if isinstance(ended, LoadError):
        cli.fail(str(ended), code=1)
    if ended:
        sys.exit(130)


def read_prompts() -> tuple[list[str], bool]:
    """Prompts from flags, files, or standard input, otherwise two of our own; and whether the user gave any."""
    prompts = list(PROMPT.value)
    if "" in prompts:
        raise UserError("the prompt is empty; write some text after --prompt=")
    for flag in (PROMPT, SYSTEM):
        if any("\udc80" <= character <= "\udcff" for character in "".join(flag.value)):  # bytes that are no UTF-8
            raise UserError(f"--{flag.name} is not UTF-8 text; write it in UTF-8")
    for name in PROMPT_FILE.value:
        try:
            prompts.append(Path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"--prompt_file={name}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file={name}: cannot be read as UTF-8 text ({error})") from None
        if not prompts[-1]:
            raise UserError(f"--prompt_file={name} is empty; write the prompt into it")
    if not prompts and sys.stdin and not sys.stdin.isatty() and (text := standard_input()):
        prompts.append(text)
    return (prompts, True) if prompts else (DEFAULT_PROMPTS, False)


def standard_input() -> str:
    """All of it; nothing where it cannot be read, as under nohup. Says on stderr if it has to wait."""
    if not select.select([0], [], [], 0)[0]:
        print("reading the prompt from standard input (end it with Ctrl-D) ...", file=sys.stderr, flush=True)
    try:
        with open(0, encoding="utf-8", closefd=False) as file:  # sys.stdin has the encoding of the locale
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input cannot be read as UTF-8 text ({error})") from None
    except OSError:
        return ""


def describe(model, chosen: bool) -> None:
    """Says which model runs, and how its experts are kept."""
    from moe_jax.checkpoint.converted import Converted

    config, a = model.config, model.checkpoint.architecture
    experts = a.num_moe_layers * a.num_experts
    kept = "all on the device"
    if config.offload.tier != "none":
        source = model.engine.source
        kept = (
            f"{experts * source.store.expert_bytes / 1e6:.1f} MB in {config.offload.tier} memory, a budget of"
            f" {source.store.budget_bytes / 1e6:.1f} MB ({config.offload.device_budget}) on the device,"
            f" predictor {config.prefetch.predictor}, policy {config.offload.policy}"
        )
    name = "the shipped model" if not config.checkpoint else config.checkpoint
    print(f"{name}: {a.num_layers} layers, {a.num_experts} experts, {a.top_k} active; experts: {kept}")
    if not config.checkpoint:
        print("For another model: --config.checkpoint=DIR, a Hugging Face directory such as Mixtral-8x7B-v0.1")
    elif not isinstance(model.checkpoint, Converted):
        print(
            f"To convert it once: python convert.py --checkpoint={config.checkpoint} --output=DIR"
            " [--quantization=packed]"
        )
    for note in model.notes:
        print(note)
    if not chosen:
        print("No prompt given (--prompt, --prompt_file or standard input): two of our own, at temperature 0.6")


def stream(generation) -> BaseException | None:
    """Prints text as it comes; several prompts are printed whole, one after another. Returns what ended it early."""
    written, pieces, ended = generation.outputs, iter(generation), None
    live = len(written) == 1
    try:
        if live:
            with cli.status(f"reading the prompt, {len(written[0].prompt_token_ids)} tokens"):
                _, piece = next(pieces, (0, ""))
            print(f"\n{written[0].prompt}{piece}", end="", flush=True)
            for _, piece in pieces:
                print(piece, end="", flush=True)
        else:
            with cli.progress(f"{len(written)} prompts, new tokens", len(written) * MAX_NEW_TOKENS.value) as advance:
                for _ in pieces:
                    advance(sum(len(output.token_ids) for output in written))
    except (KeyboardInterrupt, LoadError) as error:
        ended = error
    if live:
        print("\n")
    else:
        for index, output in enumerate(written):
            print(f"\n--- prompt {index + 1}\n{output.prompt}{output.text}")
        print()
    if ended is not None:
        what = "interrupted" if isinstance(ended, KeyboardInterrupt) else "an expert could not be loaded"
        print(f"{what}: what follows covers the tokens so far\n")
    return ended


def print_table(metrics: dict, simulated: bool) -> None:
    """Every number of the run, with its unit, for a person."""
    from rich.console import Console
    from rich.table import Table

    mark = " (simulated link)" if simulated else ""
    ms = lambda s: "-" if s is None else f"{1e3 * s:.2f} ms"
    pct = lambda x: "-" if x is None else f"{100 * x:.1f}%"
    mb = lambda x: "-" if x is None else f"{x / 1e6:.3f} MB"
    number = lambda x, digits: "-" if x is None else f"{x:.{digits}f}"
    tpot, needed, moved = metrics["tpot_s"], metrics["needed"], metrics["bytes_per_token"]
    rows = [
        ("time to first token", ms(metrics["ttft_s"])),
        ("time per output token, median / p90 / p99", " / ".join(map(ms, tpot.values())) + mark),
        (
            "tokens per second, all prompts",
            number(metrics["tokens_per_s"], 1),
        ),
        ("compilation, not in the times above", ms(metrics["compile_s"])),
        (f"needed experts: {' / '.join(needed)}", " / ".join(map(pct, needed.values()))),
        ("hit rate (cached + prefetched)", pct(metrics["hit_rate"])),
        ("recall of the prediction one layer ahead", pct(metrics["recall"])),
        ("ready recall (prefetched of those not cached)", pct(metrics["ready_recall"])),
        ("tokens and layers with other experts than the true router's", pct(metrics["departed"])),
        (f"bytes per token: {' / '.join(moved)}", " / ".join(map(mb, moved.values()))),
        ("waited for experts, per token", ms(metrics["stall_s_per_token"]) + mark),
        ("predictor alone, per token", ms(metrics["predictor_s_per_token"])),
        ("bound with perfect overlap, max(C, T); C with the budget's experts", ms(metrics["bound_overlap_s"]) + mark),
        ("bound with none, C + T (LRU on demand)", ms(metrics["bound_serial_s"]) + mark),
        ("overlap share", number(metrics["overlap_share"], 2)),
        (
            "peak expert bytes on the device / budget",
            " / ".join(mb(metrics[name]) for name in ("peak_device_cache_bytes", "device_budget_bytes")),
        ),
        ("peak memory of the process", mb(metrics["peak_rss_bytes"])),
    ]
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name.replace("_", " "), value)
    console = Console()
    Console(width=max(console.width, 110) if not console.is_terminal else None).print(table)


if __name__ == "__main__":
    cli.run(main)

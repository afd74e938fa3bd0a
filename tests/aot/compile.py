"""Compiles everything a request can need, at real sizes, for a device that is not here. Runs in a process of its own:

python -m tests.aot.compile {h100,v5e} OUT.json
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.checkpoint.families import family
from moe_jax.inference.compilation import compile_for
from moe_jax.model.architecture import Architecture
from moe_jax.model.experts import ExpertWeights, run_experts
from tests.aot.planted import PLANTED
from tests.aot.record import POSITIONS, QUANTISED, Recorder, abstract_engine, abstract_experts, cache_of, recording
from tests.families.test_real_sizes import MODELS

NEW_TOKENS, CHUNK = 512, 256
PLATFORMS = {"h100": "gpu", "v5e": "tpu"}
# As XLA describes an H100 SXM.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 pcie_bandwidth: 34359738368
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass
class Compiled:
    """One executable.

    Attributes:
      model, phase, stage: a key of `MODELS`, "prefill" or "decode", and the name of the jitted function; of experts
        that are quantised, the key and in what form, and "any".
      batch: rows of the request.
      arguments: (shape, dtype) of every array.
      arity, bucket: of a call of experts; 0: it is none.
      temporary_bytes: that the executable allocates while it runs.
      new_output_bytes: of outputs that take no argument's memory.
      host_bytes: temporary ones in host memory.
      hlo: what XLA made of it.
    """

    model: str
    phase: str
    stage: str
    batch: int
    arguments: list[Any]
    arity: int
    bucket: int
    temporary_bytes: int = 0
    new_output_bytes: int = 0
    host_bytes: int = 0
    hlo: str = ""


def calls_of(a: Architecture, batch: int, platform: str) -> list[tuple[Recorder, str, Any]]:
    """What `Engine.compile` compiles for a batch of prompts that fill the cache."""
    with recording() as calls:
        compile_for(abstract_engine(a, platform), [POSITIONS - NEW_TOKENS] * batch, NEW_TOKENS, abstract_experts(a))
        return list(calls.values())


def compiler_for(target: str) -> Callable[[Any, Any], tuple[Any, str]]:
    """A function that compiles a traceable one for shapes, and gives its memory statistics and HLO."""
    if target == "v5e":
        topology = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu")
        sharding = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())

        def compile_tpu(function, shapes):
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
            done = function.trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
            return done.memory_analysis(), done.as_text()

        return compile_tpu
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    device = topology.devices[0]

    def compile_gpu(function, shapes):
        # A device that only compiles has no memories, and the public path needs them.
        lowered = function.trace(*shapes).lower(lowering_platforms=("cuda",))
        done = device.client.compile(
            lowered._lowering.stablehlo(),
            executable_devices=_jax.DeviceList((device,)),
            compile_options=compiler.get_compile_options(num_replicas=1, num_partitions=1),
        )
        return done.get_compiled_memory_stats(), done.hlo_modules()[0].to_string()

    return compile_gpu


def compiled(compile: Callable[..., Any], model: str, phase: str, batch: int, function: Any, shapes: Any) -> Compiled:
    """Compiles one function."""
    experts = [x for x in jax.tree.leaves(shapes, is_leaf=_is_expert) if _is_expert(x)]
    bucket = shapes[2].shape[1] if experts else 0  # rows int32 [A, b]
    if function.name == "run_chosen":
        bucket = 1  # what stands there are the choices of one row
    arguments = [(x.shape, x.dtype.name) for x in jax.tree.leaves(shapes)]
    result = Compiled(model, phase, function.name, batch, arguments, len(experts), bucket)
    memory, result.hlo = compile(function, shapes)
    result.temporary_bytes = memory.temp_size_in_bytes
    result.new_output_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    result.host_bytes = memory.host_temp_size_in_bytes + memory.host_output_size_in_bytes
    return result


def _is_expert(x: Any) -> bool:
    return isinstance(x, ExpertWeights)


def main(target: str, out: str) -> None:
    compile = compiler_for(target)
    done = []
    for model in ("Mixtral-8x7B", "Qwen3-30B-A3B"):
        a = family(MODELS[model].config).read_config(MODELS[model].config)
        for batch in (1, 8):
            for function, phase, shapes in calls_of(a, batch, PLATFORMS[target]):
                # Of a batch only the stages that read the cache: they have the largest temporaries.
                if batch == 1 or (batch, POSITIONS) in [cache_of(x.shape) for x in jax.tree.leaves(shapes)]:
                    done.append(compiled(compile, model, phase, batch, function, shapes))
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    for model in ("Mixtral-8x7B", "gpt-oss-20b"):
        a = family(MODELS[model].config).read_config(MODELS[model].config)
        experts = Recorder(functools.partial(run_experts, a.experts.activation), donate_argnums=0)
        for form, rows in itertools.product(QUANTISED, (1, 2, CHUNK)):
            index = shape(1, rows, dtype=jnp.int32)
            hidden = shape(rows * a.top_k, a.d_model), shape(rows, a.d_model)
            shapes = (*hidden, index, index, (abstract_experts(a, form),))
            done.append(compiled(compile, f"{model}, {form}", "any", 1, experts, shapes))
    a = family(MODELS["Mixtral-8x7B"].config).read_config(MODELS["Mixtral-8x7B"].config)
    errors = {}
    for name, plant in PLANTED.items():
        index = shape(2, 1, dtype=jnp.int32)
        shapes = (shape(2, a.d_model), shape(1, a.d_model), index, index, (abstract_experts(a),) * 2)
        try:
            done.append(compiled(compile, name, "decode", 1, Recorder(plant, donate_argnums=0), shapes))
        except Exception as error:
            errors[name] = str(error)
    Path(out).write_text(json.dumps({"compiled": [dataclasses.asdict(c) for c in done], "errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One contender in a process of its own: `python -m moe_jax.evaluation.peers.contender JSON` prints JSON last.

The argument is what `race.Contender.command` makes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs it; {"run": fields of `Run`, "metrics": ours only}."""
    engine, prompt_ids, new_tokens = spec["engine"], spec["prompt_ids"], spec["new_tokens"]
    # Each imports its own engine alone: what is imported counts against the cap.
    if engine == "moe_jax":
        from moe_jax.cli import use_compilation_cache
        from moe_jax.evaluation.peers import ours

        use_compilation_cache()
        run, metrics = ours.run(spec["config"], spec["prompt"], new_tokens, spec["bounds"])
        return {"run": dataclasses.asdict(run), "metrics": metrics}
    if engine == "llama.cpp":
        from moe_jax.evaluation.peers.llama_cpp import LlamaCpp

        context = len(prompt_ids) + new_tokens + 8
        run = LlamaCpp(Path(spec["file"]), context, spec["loading"]).generate(prompt_ids, new_tokens)
    else:
        from moe_jax.evaluation.peers import torch_models

        checkpoint, dtype = Path(spec["checkpoint"]), spec["dtype"]
        if engine == "transformers":
            run = torch_models.resident(checkpoint, dtype, prompt_ids, new_tokens)
        else:
            folder, buffers = Path(spec["folder"]), spec["buffers"]
            run = torch_models.offloaded(checkpoint, folder, dtype, buffers, prompt_ids, new_tokens)
    return {"run": dataclasses.asdict(run)}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

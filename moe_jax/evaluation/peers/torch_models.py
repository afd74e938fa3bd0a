"""`transformers` with everything resident, and `accelerate` with everything on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moe_jax.evaluation.peers.run import Run

Dtype = Literal["float32", "bfloat16"]


def prepare_offload(checkpoint: Path, folder: Path, dtype: Dtype) -> Path:
    """Writes what `accelerate.disk_offload` reads, once; holds the whole model in memory meanwhile."""
    from accelerate.utils import offload_state_dict

    if not (folder / "index.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        offload_state_dict(str(folder), _load(checkpoint, dtype).state_dict())
    return folder


def resident(checkpoint: Path, dtype: Dtype, prompt_ids: Sequence[int], new_tokens: int) -> Run:
    """A run of `transformers` as it is."""
    return generate(_load(checkpoint, dtype), prompt_ids, new_tokens)


def offloaded(
    checkpoint: Path, folder: Path, dtype: Dtype, buffers: bool, prompt_ids: Sequence[int], new_tokens: int
) -> Run:
    """A run with `accelerate.disk_offload`; `buffers`: its `offload_buffers`."""
    import torch
    from accelerate import disk_offload, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.eval()
    disk_offload(model, str(folder), execution_device=torch.device("cpu"), offload_buffers=buffers)
    return generate(model, prompt_ids, new_tokens)


def generate(model: Any, prompt_ids: Sequence[int], new_tokens: int) -> Run:
    """Greedy, with a key/value cache, up to the end of the text."""
    import torch

    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    tokens, times, cache = [], [time.perf_counter()], None
    ids = torch.tensor([list(prompt_ids)])
    with torch.inference_mode():
        while len(tokens) < new_tokens and not ends & set(tokens[-1:]):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokens.append(int(out.logits[0, -1].argmax()))
            times.append(time.perf_counter())
            ids = torch.tensor([tokens[-1:]])
    return Run(tokens, (times[-1] - times[1]) / max(len(tokens) - 1, 1), times[1] - times[0])


def _load(checkpoint: Path, dtype: Dtype) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()

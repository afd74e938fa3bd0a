"""Time per token with everything in memory, float32: ours, `transformers` and llama.cpp, same weights, taking turns.

    python -m tests.peers.resident_speed --folder=/tmp/resident_speed

Makes a Mixtral of random bfloat16 weights there once: 30 layers of 16 experts of 576 x 1152, K = 2, 955M parameters in
experts (2 GB, and 4 GB as float32 GGUF; llama.cpp's float32 weights are the same values). Each turn decodes the same
prompt greedily; the least and the median time over all turns are printed, and how many leading tokens agree: random
routers often choose between nearly equal experts, so that some rounding sooner or later changes a choice, and with it
the text (of ours too, when the same tokens enter as one prompt). Hence the prompt is short.
Needs 14 GB of memory, torch, transformers, and `pip install 'moe_jax[peers]'`.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint.families import mixtral
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.evaluation.gguf_file import write_gguf
from moe_jax.evaluation.peers.llama_cpp import LlamaCpp
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.model.decoder import Stages, device_weights
from tests.tiny import write_tiny

PROMPT = 8
Generate = Callable[[list[int], int], tuple[list[int], float]]
"""Prompt and number of tokens to the tokens, and seconds per token after the first."""


def ours(checkpoint: HFCheckpoint, widen: Any) -> Generate:
    stages = Stages(checkpoint.architecture, jnp.float32)
    engine = Engine(stages, device_weights(checkpoint.dense(), jnp.float32), ResidentExperts(checkpoint, widen))

    def generate(prompt: list[int], count: int) -> tuple[list[int], float]:
        logits, state = engine.prefill([prompt], 256 - len(prompt))
        tokens, began = [int(np.asarray(logits)[0].argmax())], time.perf_counter()
        while len(tokens) < count:
            logits = engine.decode(np.array(tokens[-1:], np.int32), state)
            tokens.append(int(np.asarray(logits)[0].argmax()))
        return tokens, (time.perf_counter() - began) / (count - 1)

    return generate


def transformers(folder: Path) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(prompt: list[int], count: int) -> tuple[list[int], float]:
        out = model(torch.tensor([prompt]), use_cache=True)
        tokens, began = [int(out.logits[0, -1].argmax())], time.perf_counter()
        while len(tokens) < count:
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        return tokens, (time.perf_counter() - began) / (count - 1)

    return generate


def llama_cpp(file: Path) -> Generate:
    model = LlamaCpp(file, 256, "read")

    def generate(prompt: list[int], count: int) -> tuple[list[int], float]:
        run = model.generate(prompt, count)
        return run.token_ids, run.tpot_s

    return generate


def model_in(folder: Path, layers: int) -> Path:
    """The random model in a folder, made there if it is not."""
    sizes: dict[str, Any] = dict(vocab_size=49152, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64)
    sizes |= dict(num_experts=16, top_k=2, expert_ff=1152, max_seq_len=2048, rope_theta=10000.0, bos_id=0)
    a = mixtral.architecture(num_layers=layers, eos_ids=(1,), tie_embeddings=True, **sizes)
    directory = folder / f"{layers}-layers"
    if not (directory / "config.json").is_file():
        write_tiny(directory, a)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    folder = model_in(args.folder, args.layers)
    file, checkpoint = write_gguf(folder, folder / "float32.gguf"), HFCheckpoint(folder)
    contenders = {
        "ours, float32 experts": ours(checkpoint, jnp.float32),
        "ours, bfloat16 experts": ours(checkpoint, None),
        "transformers": transformers(folder),
        "llama.cpp": llama_cpp(file),
    }
    prompt = np.random.default_rng(0).integers(3, checkpoint.architecture.vocab_size, PROMPT).tolist()
    tokens, times = {}, {name: [] for name in contenders}
    for turn in range(args.turns + 1):  # the first warms up
        for name, generate in contenders.items():
            tokens[name], seconds = generate(prompt, args.tokens)
            times[name] += [seconds] if turn else []
    first = tokens["ours, float32 experts"]
    print(
        f"{args.layers} layers, {args.tokens} tokens after {PROMPT}, {args.turns} turns, load {os.getloadavg()[0]:.1f}"
    )
    for name, found in times.items():
        same = next((i for i, (x, y) in enumerate(zip(first, tokens[name], strict=False)) if x != y), len(tokens[name]))
        least, middle = 1e3 * min(found), 1e3 * statistics.median(found)
        print(f"{name:24} least {least:6.1f} ms  median {middle:6.1f} ms  first {same} of {len(first)} tokens as ours")


if __name__ == "__main__":
    main()

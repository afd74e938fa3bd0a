"""Tiny random checkpoints in Hugging Face format, made on the spot, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe_jax.checkpoint.families import mixtral
from moe_jax.model.architecture import Architecture

SIZES: dict[str, Any] = dict(
    vocab_size=259,
    d_model=32,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=7,
    top_k=2,
    expert_ff=24,
    max_seq_len=256,
    rope_theta=10000.0,
    bos_id=0,
    eos_ids=(1,),
)
TINY = mixtral.architecture(**SIZES)


def write_tiny(directory: Path, a: Architecture = TINY, seed: int = 0, dtype=ml_dtypes.bfloat16) -> Path:
    """Weights large enough that routing differs from token to token and logits are far from even."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = mixtral.layouts(a)[0]
    experts = [names.expert(layer, e) for layer in range(a.num_layers) for e in range(a.num_experts)]
    rows = [*names.dense.values(), *(part for parts in experts for part in parts.values())]
    named = {}
    for name, shape in ((piece.name, piece.shape) for row in rows for piece in row):
        values = rng.normal(size=shape) * (1.0 if "embed" in name else shape[-1] ** -0.5 * 1.5)
        named[name] = (1 + 0.1 * rng.normal(size=shape) if "norm" in name else values).astype(dtype)
    save_file(named, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(mixtral.write_config(a, np.dtype(dtype).name)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, **{char: i + 3 for i, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return directory

"""Writes a trained model as a Hugging Face directory that `transformers` and `HFCheckpoint` read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from moe_jax.checkpoint.families import mixtral
from moe_jax.checkpoint.hf import SINGLE
from moe_jax.checkpoint.names import Rows
from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture


def save(directory: str | Path, architecture: Architecture, params: dict[str, Any], data_dir: str | Path) -> None:
    """Writes config.json, bfloat16 weights, tokenizer and generation settings.

    Args:
      directory: made when absent. config.json is written last: a directory without it is not a finished export.
      params: `moe_jax.training.lm.Params`: dense pure dict and experts stacked per layer, any float dtype.
      data_dir: where the corpus wrote tokenizer.json.

    Raises:
      UserError: `data_dir` has no tokenizer.json.
    """
    directory, a = Path(directory), architecture
    source = Path(data_dir) / "tokenizer.json"
    if not source.is_file():
        raise UserError(f"{source} not found; give the data directory that moe_jax.training.corpus wrote")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    save_file(_named(a, params), directory / SINGLE, metadata={"format": "pt"})
    shutil.copyfile(source, directory / "tokenizer.json")
    tokens = {token["id"]: token["content"] for token in json.loads(source.read_text())["added_tokens"]}
    special = {"bos_token": a.bos_id, "eos_token": a.eos_ids[0] if a.eos_ids else None}
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": a.max_seq_len,
            "clean_up_tokenization_spaces": False,
            **{name: tokens[i] for name, i in special.items() if i is not None},
        },
    )
    config = mixtral.write_config(a, "bfloat16")
    _write(directory / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    _write(directory / "config.json", config)


def _named(a: Architecture, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Bfloat16 tensors by Hugging Face name."""
    named: dict[str, np.ndarray] = {}
    released = mixtral.layouts(a)[0]
    for path, rows in released.dense.items():
        node = params["dense"]
        for key in path:
            node = node[key]
        named.update(_split(node, rows))
    for layer, experts in enumerate(params["experts"]):
        for e in range(a.num_experts):
            for part, rows in released.expert(layer, e).items():
                named.update(_split(experts[part][e], rows))
    return named


def _split(array: Any, rows: Rows) -> dict[str, np.ndarray]:
    array = np.asarray(array).astype(ml_dtypes.bfloat16)
    ends = np.cumsum([piece.shape[0] for piece in rows])
    assert array.shape[0] == ends[-1], f"{[piece.name for piece in rows]} do not fit an array of {array.shape}"
    parts = np.split(array, ends[:-1])
    assert all(part.shape == piece.shape for part, piece in zip(parts, rows, strict=True))
    return {piece.name: part for piece, part in zip(rows, parts, strict=True)}


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

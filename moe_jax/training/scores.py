"""Scores of an exported model on held-out texts, and the model card that states them."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.model.layers import Decoder, parameter_counts
from moe_jax.model.platforms import reproducible
from moe_jax.training import lm

CONTEXT = 256


def load_params(checkpoint: HFCheckpoint) -> tuple[Any, lm.Params]:
    """Graph definition and float32 training parameters of a checkpoint."""
    a = checkpoint.architecture
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(a, rngs=nnx.Rngs(0))))
    widen = lambda x: jnp.asarray(np.asarray(x).astype(np.float32))
    experts = []
    for layer in range(a.num_layers):
        stacked = jax.tree.map(lambda *x: np.stack(x), *(checkpoint.expert(layer, e) for e in range(a.num_experts)))
        experts.append({name: widen(getattr(stacked, name)) for name in ("gate_up", "down")})
    return graph, {"dense": jax.tree.map(widen, checkpoint.dense()), "experts": experts}


def score_text(checkpoint: HFCheckpoint, text: str, context: int = CONTEXT) -> dict[str, float]:
    """Bits per byte of one text, and how evenly its tokens use the experts.

    The text is one stream after a bos token, cut into windows of `context` inputs with stride `context`, the last one
    shorter; every token is predicted exactly once.

    Returns:
      bits_per_byte; xz_bits_per_byte (of `xz -9e`); ratio of the two; least_used_expert: the smallest share of
      assignments that any expert of any layer gets, over its fair share.
    """
    a = checkpoint.architecture
    graph, params = load_params(checkpoint)
    ids = np.asarray(Tokenizer.from_file(str(checkpoint.directory / "tokenizer.json")).encode(text).ids, np.int32)
    count = -(-(len(ids) - 1) // context)
    padded = np.pad(ids, (0, count * context + 1 - len(ids)))
    rows = np.stack([padded[i * context : (i + 1) * context + 1] for i in range(count)])
    real = (np.arange(count * context) < len(ids) - 1).reshape(count, context)

    @reproducible()
    def score(row, mask):
        logits, stats = lm.forward(a, graph, params, row[None, :-1], a.num_experts / a.top_k)  # nothing dropped
        nats = optax.softmax_cross_entropy_with_integer_labels(logits[0], row[1:])
        return jnp.sum(nats * mask), stats["load"] * jnp.all(mask)

    nats, load = 0.0, np.zeros((a.num_layers, a.num_experts))
    for row, mask in zip(rows, real, strict=True):
        one, used = score(row, mask)
        nats, load = nats + float(one), load + np.asarray(used)
    size = len(text.encode())
    packed = 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) / size
    bits = nats / math.log(2) / size
    share = load / load.sum(1, keepdims=True) * a.num_experts
    return {
        "bits_per_byte": bits,
        "xz_bits_per_byte": packed,
        "ratio": bits / packed,
        "least_used_expert": float(share.min()),
        "most_used_expert": float(share.max()),
    }


def write_card(directory: Path, held_out: Path, config: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """Scores the exported model on every `held_out_*.txt` and writes README.md and scores.json beside it."""
    checkpoint = HFCheckpoint(directory)
    scores = {
        file.stem.removeprefix("held_out_"): score_text(checkpoint, file.read_text(encoding="utf-8"))
        for file in sorted(held_out.glob("held_out_*.txt"))
    }
    (directory / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    a = checkpoint.architecture
    counts = parameter_counts(a)
    lines = [
        f"| {name} | {s['bits_per_byte']:.3f} | {s['xz_bits_per_byte']:.3f} | {100 * s['ratio']:.1f}% |"
        f" {s['least_used_expert']:.2f} to {s['most_used_expert']:.2f} |"
        for name, s in scores.items()
    ]
    tokens = config["steps"] * config["batch_tokens"]
    seen = ", ".join(f"{name} {d['train']['tokens'] / 1e6:.1f}M" for name, d in manifest["domains"].items())
    (directory / "README.md").write_text(
        CARD.format(
            total=counts["total"] / 1e6,
            active=counts["active"] / 1e6,
            a=a,
            tokens=tokens / 1e6,
            seen=seen,
            seed=config["seed"],
            steps=config["steps"],
            table="\n".join(lines),
        )
    )
    return scores


CARD = """# tiny_moe: a small Mixtral that was really trained

{total:.1f}M parameters ({active:.1f}M multiplied per token), {a.num_layers} layers of {a.num_experts} experts with
{a.top_k} active, D = {a.d_model}, expert width {a.experts.ff}, {a.vocab_size}-token byte-level BPE, context
{a.max_seq_len}, bfloat16. It exists so that expert prefetching can be run and studied on any machine; its text is
fluent nonsense.

**Data.** Python 3.11 standard library sources and the sources of the Python 3.11 manual (PSF licence), the King James
Bible (public domain). Training tokens available: {seen}; {tokens:.1f}M were drawn, by domain weight, in windows.
Documents were split once into train, validation and test. One thing was then chosen on that test split: the higher
balance loss of the last 200 steps was added after it showed experts starved on prose; and the form of the first
predictor was chosen while looking at it. So it is shipped as `development` texts, and the test texts (`held_out`) are
others, of other authors, that nobody had looked at: `moe_jax/training/held_out.py` says how they were made.

**Licence.** Apache-2.0 for the weights; the texts keep theirs.

**Command.** The data first, as the docstring of `moe_jax/training/corpus.py` says, then (seed {seed}, {steps} steps):

    python train_lm.py --config=configs/tiny_lm.py --config.data=DATA --config.output=RUN --export=moe_jax/shipped/model

**Scores** on the shipped `held_out_*.txt` (Werkzeug's sources and manual, the Book of Mormon), context 256, stride 256,
float32 arithmetic on the bfloat16 weights:

| text | bits per byte | xz -9e | ratio | use of an expert over its fair share, least to most |
|---|---|---|---|---|
{table}
"""

"""Writes a checkpoint of the Mixtral architecture as GGUF, so that llama.cpp runs the same weights.

Needs the package `gguf` (pip install 'moe_jax[peers]').
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from moe_jax.checkpoint.converted import open_checkpoint
from moe_jax.checkpoint.families import mixtral
from moe_jax.errors import UserError
from moe_jax.model.architecture import GroupedQuery

Dtype = Literal["float32", "bfloat16"]


def write_gguf(source: str | Path, file: str | Path, dtype: Dtype = "float32") -> Path:
    """Writes `file` unless it is there already; keeps one layer of experts in memory.

    Matrices get `dtype` (a bfloat16 checkpoint keeps its values in both); norms and routers are float32, as llama.cpp
    wants them. llama.cpp rounds activations to the dtype of a matrix: only float32 computes in float32. Tokens
    are called by their numbers (see `token_ids`): give llama.cpp ids, not text.

    Args:
      source: a Hugging Face directory or a converted one, of the Mixtral architecture.

    Raises:
      UserError: it is of another architecture, or the package `gguf` is missing.
    """
    file = Path(file)
    if file.is_file():
        return file
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the package gguf: pip install 'moe_jax[peers]'") from None
    checkpoint = open_checkpoint(source)
    a = checkpoint.architecture
    if not is_mixtral(checkpoint):
        raise UserError(f"{source} is no Mixtral: other architectures are not written as GGUF")
    s = a.attention
    assert isinstance(s, GroupedQuery)
    partial = file.with_name(file.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(a.max_seq_len)
    writer.add_embedding_length(a.d_model)
    writer.add_block_count(a.num_layers)
    writer.add_feed_forward_length(a.experts.ff)
    writer.add_head_count(s.num_heads)
    writer.add_head_count_kv(s.num_kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_rope_freq_base(a.rope.theta)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_expert_count(a.num_experts)
    writer.add_expert_used_count(a.top_k)
    writer.add_vocab_size(a.vocab_size)
    kind = gguf.GGMLQuantizationType.F32 if dtype == "float32" else gguf.GGMLQuantizationType.BF16
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "float32" else gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokens(writer, gguf, a)

    tensors = lambda: _tensors(checkpoint)
    shapes = {name: (shape, matrix) for name, shape, matrix, _ in tensors()}
    for name, (shape, matrix) in shapes.items():
        size = int(np.prod(shape))
        if matrix and dtype == "bfloat16":
            writer.add_tensor_info(name, shape, np.dtype(np.uint16), 2 * size, kind)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * size)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, matrix, read in tensors():
            array = np.asarray(read()).astype(ml_dtypes.bfloat16 if matrix and dtype == "bfloat16" else np.float32)
            writer.write_tensor_data(array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)
    finally:
        writer.close()
    os.replace(partial, file)
    return file


def is_mixtral(checkpoint) -> bool:
    """Whether the checkpoint has plain float weights and is a Mixtral in everything that this file writes."""
    a, s = checkpoint.architecture, checkpoint.architecture.attention
    if not isinstance(s, GroupedQuery) or checkpoint.dtype not in ("float32", "bfloat16", "float16"):
        return False
    plain = mixtral.architecture(
        vocab_size=a.vocab_size,
        d_model=a.d_model,
        num_layers=a.num_layers,
        num_heads=s.num_heads,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        num_experts=a.num_experts,
        top_k=a.top_k,
        expert_ff=a.experts.ff,
        max_seq_len=a.max_seq_len,
        rope_theta=a.rope.theta,
        norm_eps=a.norm_eps,
        tie_embeddings=a.tie_embeddings,
        bos_id=a.bos_id,
        eos_ids=a.eos_ids,
    )
    return a == plain


def _tensors(checkpoint) -> Iterator[tuple[str, tuple[int, ...], bool, Callable[[], np.ndarray]]]:
    """Name, shape, whether it is a matrix (takes the file's dtype), and how to read it."""
    a = checkpoint.architecture
    s, d, E, f = a.attention, a.d_model, a.num_experts, a.experts.ff
    heads, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    dense = checkpoint.dense_array
    yield "token_embd.weight", (a.vocab_size, d), True, lambda: dense(("embedding",))
    yield "output_norm.weight", (d,), False, lambda: dense(("norm", "weight"))
    if not a.tie_embeddings:
        yield "output.weight", (a.vocab_size, d), True, lambda: dense(("head",))
    for layer in range(a.num_layers):
        at, path = f"blk.{layer}", ("layers", layer)
        part = lambda *rest, path=path: dense((*path, *rest))
        qkv = lambda part=part: np.split(part("attention", "qkv"), [heads, heads + kv])
        yield f"{at}.attn_norm.weight", (d,), False, lambda part=part: part("attention_norm", "weight")
        yield f"{at}.attn_q.weight", (heads, d), True, lambda qkv=qkv: _adjacent_pairs(qkv()[0], s.num_heads)
        yield f"{at}.attn_k.weight", (kv, d), True, lambda qkv=qkv: _adjacent_pairs(qkv()[1], s.num_kv_heads)
        yield f"{at}.attn_v.weight", (kv, d), True, lambda qkv=qkv: qkv()[2]
        yield f"{at}.attn_output.weight", (d, heads), True, lambda part=part: part("attention", "out")
        yield f"{at}.ffn_norm.weight", (d,), False, lambda part=part: part("expert_norm", "weight")
        yield f"{at}.ffn_gate_inp.weight", (E, d), False, lambda part=part: part("router", "weight")
        expert = lambda e, layer=layer: checkpoint.expert(layer, e)
        every = lambda pick, expert=expert: np.stack([pick(expert(e)) for e in range(E)])
        yield f"{at}.ffn_gate_exps.weight", (E, f, d), True, lambda every=every: every(lambda w: w.gate_up[:f])
        yield f"{at}.ffn_up_exps.weight", (E, f, d), True, lambda every=every: every(lambda w: w.gate_up[f:])
        yield f"{at}.ffn_down_exps.weight", (E, d, f), True, lambda every=every: every(lambda w: w.down)


def _adjacent_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head reordered: we rotate row i with row i + H/2, llama.cpp 2i with 2i + 1."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def token_ids(text: str) -> list[int]:
    """What llama.cpp generated, from the text that it made of it."""
    return [int(name) for name in text.split(",")[:-1]]


def _add_tokens(writer, gguf, a) -> None:
    """Every token is called by its number and a comma: llama.cpp answers with text alone, and real text may hide some
    (special ones, halves of characters)."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    names = [f"{i}," for i in range(a.vocab_size)]
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.NORMAL] * a.vocab_size)
    writer.add_token_merges([" ".join(names[:2])])  # one at least is wanted; no text is encoded
    writer.add_add_bos_token(False)
    if a.bos_id is not None:
        writer.add_bos_token_id(a.bos_id)
    if a.eos_ids:
        writer.add_eos_token_id(a.eos_ids[0])

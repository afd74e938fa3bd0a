"""Weights in FP8 with a scale for every block, as DeepSeek-V3 (arXiv 2412.19437, section 3.3) and Qwen3's FP8 variants
are released.

A matrix `x.weight` of e4m3 numbers comes with `x.weight_scale_inv`: one scale per 128 rows and 128 columns, those at
the edges for what is left. What they stand for, number times scale, is read rounded to bfloat16, as DeepSeek's own
`fp8_cast_bf16.py` writes it. Activations are not rounded to FP8, which is a matter of speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.checkpoint.safetensors_file import FLOATS, Tensor, read_into
from moe_jax.errors import UserError
from moe_jax.memory import empty

FP8 = "F8_E4M3"
_SCALES = "_scale_inv"
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_STRIP = 1 << 20  # numbers widened at once
Block = tuple[int, int]
"""Rows and columns that share a scale."""


def block_of(quantization: Mapping[str, Any]) -> Block:
    """The blocks that a `quantization_config` describes.

    Raises:
      UserError: it asks for something else.
    """
    fields = dict(quantization)
    if (method := fields.pop("quant_method", None)) != "fp8":
        raise UserError(f"config.json asks for quantization_config.quant_method={method!r}; supported: 'fp8'")
    fields.pop("modules_to_not_convert", None)  # the dtypes of the tensors say it
    fields.pop("scale_fmt", None)  # how scales were rounded before they were stored
    allowed = {"fmt": ("e4m3", None), "activation_scheme": ("dynamic", None)}
    for name, values in allowed.items():
        if (value := fields.pop(name, None)) not in values:
            raise UserError(f"config.json has quantization_config with {name}={value!r}; supported: {values[0]!r}")
    block = fields.pop("weight_block_size", None)
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise UserError(f"config.json has quantization_config with weight_block_size={block!r}; supported: two sizes")
    if left := {name: value for name, value in fields.items() if value}:
        raise UserError(f"config.json has quantization_config with unsupported fields {left}")
    return block[0], block[1]


def with_scales(tensors: Mapping[str, Tensor], block: Block) -> dict[str, Tensor]:
    """The tensors with every matrix in FP8 as one of bfloat16 that knows its scales, which are no longer listed.

    Raises:
      UserError: scales are missing, or not of the shape and dtype that belong to their matrix.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == FP8 and len(tensor.shape) == 3:
            raise UserError(f"{tensor.file} has {name}, fused experts in FP8; supported: a tensor for each expert")
        if tensor.dtype != FP8 or len(tensor.shape) != 2:
            continue
        scales = found.pop(name + _SCALES, None)
        if scales is None:
            raise UserError(f"{tensor.file} has {name} in FP8 and {name}{_SCALES} is nowhere; download it again")
        wanted = tuple(-(-n // size) for n, size in zip(tensor.shape, block, strict=True))
        if scales.shape != wanted or scales.dtype not in FLOATS:
            raise UserError(
                f"{scales.file}: {name}{_SCALES} is {scales.dtype} {list(scales.shape)}, not floats {list(wanted)}"
            )
        found[name] = tensor._replace(dtype="BF16", scales=scales)
    return found


def read_widened(tensor: Tensor, block: Block, out: np.ndarray) -> None:
    """Fills `out`, bfloat16 and of the tensor's shape, strip by strip."""
    scales = tensor.scales
    assert scales is not None
    stored = empty(scales.shape, FLOATS[scales.dtype])
    read_into(scales, stored)
    (rows, width), (height, breadth) = tensor.shape, block
    step = height * max(1, _STRIP // (height * width))
    numbers, wide = np.empty((step, width), np.uint8), np.empty((step, width), np.float32)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        read_into(tensor.rows(start, start + count), numbers[:count])
        np.take(_VALUES, numbers[:count], out=wide[:count], mode="clip")  # every byte has its value
        scale = stored[start // height : -(-(start + count) // height)].astype(np.float32)
        for i, row in enumerate(np.repeat(scale, breadth, axis=1)[:, :width]):
            wide[i * height : min((i + 1) * height, count)] *= row
        out[start : start + count] = wide[:count]

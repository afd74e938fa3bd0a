"""What a request takes on the device beside the experts, and so what budget "auto" leaves for them.

Upper estimates from the architecture alone; tests/aot compares them with what XLA allocates for an H100 and a TPU v5e.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe_jax.errors import UserError
from moe_jax.model.architecture import Architecture
from moe_jax.model.attention import BLOCK
from moe_jax.model.decoder import CHUNKS
from moe_jax.model.layers import MODULES

SPARE = 0.05
"""Share of the device that is left for executables, small arrays and fragmentation."""


class Reserve(NamedTuple):
    """Bytes that are no expert's.

    Attributes:
      cache: the key/value cache of all layers.
      activations: of the prompts' tokens between two layers of the prefill.
      temporaries: of the executable that needs most.
    """

    cache: int
    activations: int
    temporaries: int


def reserve(
    a: Architecture, batch: int, positions: int, prefill_chunk: int, itemsize: int, widens: bool = False
) -> Reserve:
    """The largest request's, for `batch` rows of `positions` each.

    Args:
      itemsize: of the compute dtype.
      widens: experts are quantised, and the device is one for which XLA widens a matrix whole before a product.
    """
    layer = sum(math.prod(shape) for shape in MODULES[type(a.attention)].cache_shapes(a.attention, batch, positions))
    # Residual stream in and out, attention's and the experts' input, and an output slot for every choice.
    token = (4 + a.top_k) * a.d_model
    rows = max(prefill_chunk, batch)
    # Float32 attention scores before and after the softmax, of a chunk over a block of the cache or of one token a row
    # over all of it, and the layer's cache in another layout (a TPU does so to latent attention's); or a block of
    # chunks while it is put together.
    scores = 2 * 4 * a.attention.num_heads * max(rows * min(positions, BLOCK), batch * positions)
    joined = CHUNKS * rows * (1 + a.top_k) * a.d_model
    # Of packed ones a TPU makes nearly two copies, of others one at most.
    widened = 2 * max(math.prod(shape) for shape in a.expert_shapes().values()) if widens else 0
    return Reserve(
        cache=layer * a.num_layers * itemsize,
        activations=max(batch * positions, CHUNKS * rows) * token * itemsize,
        temporaries=max(
            scores + (layer + rows * token) * itemsize, joined * itemsize, (widened + rows * token) * itemsize
        ),
    )


def auto_budget(limit_bytes: int, in_use_bytes: int, reserved: Reserve) -> int:
    """Bytes that device_budget "auto" gives to experts.

    Args:
      limit_bytes: that the device (or the share of it that jax takes) has.
      in_use_bytes: of them, by dense weights and whatever else is or will be there.
      reserved: for the largest request.

    Raises:
      UserError: nothing is left.
    """
    left = int((1 - SPARE) * limit_bytes) - in_use_bytes - sum(reserved)
    if left <= 0:
        gb = lambda x: f"{x / 1e9:.1f} GB"
        raise UserError(
            f"of {gb(limit_bytes)} the largest request leaves nothing for experts: weights that stay there"
            f" {gb(in_use_bytes)}, key/value cache {gb(reserved.cache)}, prompts and temporaries"
            f" {gb(sum(reserved[1:]))}; lower --config.max_seq_len or"
            " --config.batch_size, or give --config.offload.device_budget in bytes"
        )
    return left

"""Everything a request can need is compiled before it starts: nothing compiles while tokens are timed."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from moe_jax.inference.engine import Engine
from moe_jax.inference.grouping import bucket, sizes
from moe_jax.model.decoder import CHUNKS, Stream, committed
from moe_jax.model.experts import ExpertWeights


def compile_for(engine: Engine, prompt_lengths: Sequence[int], new_tokens: int, example: ExpertWeights) -> None:
    """Compiles (or loads from the persistent cache) everything the request can need of the engine.

    Args:
      prompt_lengths, new_tokens: the request.
      example: an expert of the right shapes and dtype, tied to the device as loaded ones are (`committed`).
    """
    B, Tc, S = engine.shapes(prompt_lengths, new_tokens)
    stages, a, dense = engine.stages, engine.architecture, engine.dense
    rope = stages.rope(S)
    chunks = -(-max(prompt_lengths) // Tc)
    for T, decoding in ((Tc, False), (1, True)):
        tokens = np.zeros((B, T), np.int32)
        kv, positions = stages.kv_cache(B, S), np.zeros((B, T), np.int32)
        if decoding:
            x, positions = stages.begin(dense, committed(tokens[:, 0]), positions[:, 0])
        else:
            x = stages.embed(dense, tokens)
        for layer in {kind: layer for layer, kind in enumerate(a.layers)}.values():  # one of each kind
            if a.layers[layer].dense_ff is None:
                routed = stages.route(layer, dense, rope, x, positions, kv)
            else:
                stages.dense_layer(layer, dense, rope, x, positions, kv)
        h, outputs = routed.h, routed.outputs
        arities = [arity for arity in (1, 2, 4, 8) if arity <= engine.calls.together]
        if decoding and B == 1:
            shapes = []
            for arity in arities:
                call = engine.calls.group(routed.ids, np.ones(1, bool), [0] * arity)
                outputs, _ = call(outputs, h, (example,) * arity)
            if engine.source.lends and engine.calls.can_be_ahead(B):
                for arity in engine.calls.looked_for(engine.forecast is not None):
                    call = engine.calls.ahead(routed.ids, np.full(arity, -1, np.int32))
                    outputs, _ = call(outputs, h, (example,) * arity)
        elif decoding:
            buckets = sorted({bucket(n, B) for n in range(1, B + 1)})
            shapes = [(arity, size) for arity in arities for size in buckets]
        else:
            if chunks > 1:
                h, outputs = stages.join([h] * CHUNKS)
            shapes = [(1, size) for size in sizes(len(h))]
        for shape in shapes:
            rows, slots = np.zeros(shape, np.int32), np.full(shape, len(outputs), np.int32)
            outputs, _ = stages.experts(outputs, h, rows, slots, (example,) * shape[0])
        if not decoding and chunks > 1:
            outputs = stages.split(outputs)[0]
        if decoding:
            stages.head(dense, Stream(routed.residual, outputs, routed.gates)).block_until_ready()
        else:
            jax.block_until_ready(stages.combine(routed.residual, outputs, routed.gates, x))
    if engine.execution is not None:
        jax.block_until_ready(engine.execution.warm_up(routed))
    if engine.forecast is not None:
        engine.forecast.compile(B, lambda tokens: stages.begin(dense, tokens, np.zeros(B, np.int32))[0].residual)

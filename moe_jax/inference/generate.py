"""Generation of text for a batch of prompts: streaming pieces, stopping, timing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from moe_jax.inference.engine import Engine
from moe_jax.inference.sampling import Sampling, sample
from moe_jax.inference.state import Record
from moe_jax.inference.text import StreamDecoder, Tokenizer


@dataclasses.dataclass
class Output:
    """One prompt and what was generated for it."""

    prompt: str
    prompt_token_ids: list[int]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""


@dataclasses.dataclass
class Timing:
    """Seconds; time to first token per batch, and from one token to the next, with all that a caller does meanwhile."""

    ttft_s: list[float] = dataclasses.field(default_factory=list)
    step_s: list[float] = dataclasses.field(default_factory=list)
    total_s: float = 0.0


class Generation:
    """Iterates over (row, piece of text) while it generates. `outputs`, `timing` and `record` are valid at any moment.

    Args:
      engine: compiled engine.
      tokenizer: of the same checkpoint.
      prompts: texts; prompt_ids: their tokens. More than `batch_size` of them run as consecutive batches.
      max_new_tokens: most tokens per prompt; eos or a full context ends a row earlier.
      sampling: how tokens are drawn.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        prompt_ids: Sequence[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        batch_size: int = 8,
    ):
        self.engine, self.tokenizer = engine, tokenizer
        self.outputs = [Output(text, ids) for text, ids in zip(prompts, prompt_ids, strict=True)]
        self.max_new_tokens, self.sampling, self.batch_size = max_new_tokens, sampling, batch_size
        self.timing = Timing()
        self.record = Record()
        self.capacity = 0  # cache positions of the latest batch

    def __iter__(self) -> Iterator[tuple[int, str]]:
        self.engine.record = self.record
        try:
            for start in range(0, len(self.outputs), self.batch_size):
                for row, piece in self._batch(self.outputs[start : start + self.batch_size]):
                    yield start + row, piece
        finally:
            self.engine.record = None

    def _batch(self, outputs: list[Output]) -> Iterator[tuple[int, str]]:
        engine, eos = self.engine, set(self.engine.architecture.eos_ids)
        decoders = [StreamDecoder(self.tokenizer) for _ in outputs]
        began = time.perf_counter()
        logits, state = engine.prefill([o.prompt_token_ids for o in outputs], self.max_new_tokens)
        self.capacity = state.capacity
        tokens = sample(logits, self.sampling, np.int32(0))
        times, known = self.timing.ttft_s, began
        for step in range(self.max_new_tokens):
            if step:
                tokens, times = sample(engine.decode(tokens, state), self.sampling, np.int32(step)), self.timing.step_s
            if step + 1 < self.max_new_tokens:
                engine.enter(tokens, state)
            ids, before = np.asarray(tokens), known
            known = time.perf_counter()
            times.append(known - before)
            active = state.active.copy()
            for row, output in enumerate(outputs):
                if not active[row]:
                    continue
                output.token_ids.append(int(ids[row]))
                full = state.lengths[row] >= engine.max_seq_len
                active[row] = not (ids[row] in eos or full or step + 1 == self.max_new_tokens)
                piece = "" if ids[row] in eos else decoders[row].push(int(ids[row]))
                if not active[row]:
                    piece += decoders[row].flush()
                output.text += piece
                if piece:
                    yield row, piece
            state.active = active
            self.timing.total_s += time.perf_counter() - began
            began = time.perf_counter()
            if not active.any():
                break

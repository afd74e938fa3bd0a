"""Generation of text for a batch of prompts: streaming pieces, stopping, timing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.inference.engine import Engine
from moe_jax.inference.sampling import Sampler, Sampling
from moe_jax.inference.state import Record
from moe_jax.inference.text import StreamDecoder, Tokenizer
from moe_jax.model.decoder import committed
from moe_jax.trace import Trace


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
    """Iterates over (row, piece of text) while it generates. Its attributes are valid at any moment.

    Attributes:
      outputs, timing, record, trace: of what has been generated; `trace` says nothing where no expert is moved, and
        may be replaced before the first step.
      compile_s: seconds spent compiling for it, by who made it.

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
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.timing = Timing()
        self.record, self.trace = Record(), Trace(details=False)
        self.compile_s = 0.0
        self._sample = Sampler(sampling)

    def compile(self) -> None:
        """Compiles the choice of tokens; the rest is `compile_for`'s."""
        for batch in {len(outputs) for outputs in self._batches()}:
            size, _, _ = self.engine.shapes([1] * batch, 1)
            vocabulary = self.engine.architecture.vocab_size
            self._sample(committed(np.zeros((size, vocabulary), np.float32)), 0).block_until_ready()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        start = 0
        for outputs in self._batches():
            for row, piece in self._batch(outputs):
                yield start + row, piece
            start += len(outputs)

    def _batches(self) -> list[list[Output]]:
        return [self.outputs[at : at + self.batch_size] for at in range(0, len(self.outputs), self.batch_size)]

    def _recorded(self, call: Callable[..., Any], *args: Any) -> Any:
        """A call of the engine, of which this generation hears: between two of them another one may use the engine."""
        engine: Any = self.engine
        engine.record = self.record
        if hasattr(engine.source, "trace") and engine.source.trace is not self.trace:
            engine.source.trace = self.trace
        try:
            return call(*args)
        finally:
            engine.record = None

    def _batch(self, outputs: list[Output]) -> Iterator[tuple[int, str]]:
        engine, eos = self.engine, set(self.engine.architecture.eos_ids)
        decoders = [StreamDecoder(self.tokenizer) for _ in outputs]
        began = time.perf_counter()
        prompts = [output.prompt_token_ids for output in outputs]
        logits, state = self._recorded(engine.prefill, prompts, self.max_new_tokens)
        tokens = self._sample(logits, 0)
        times, known = self.timing.ttft_s, began
        for step in range(self.max_new_tokens):
            if step:
                logits = self._recorded(engine.decode, tokens, state)
                tokens, times = self._sample(logits, step), self.timing.step_s
            if step + 1 < self.max_new_tokens:
                engine.enter(tokens, state)
            engine.source.settle()
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

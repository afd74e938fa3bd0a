"""A loaded model: checkpoint, tokenizer, expert source, predictor and engine put together."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.checkpoint.converted import open_checkpoint
from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.inference import execution, host_memory, metrics
from moe_jax.inference.compilation import compile_for
from moe_jax.inference.engine import Engine
from moe_jax.inference.execution import Execution
from moe_jax.inference.generate import Generation
from moe_jax.inference.grouping import padded
from moe_jax.inference.memory import auto_budget, reserve
from moe_jax.inference.resident import ResidentExperts
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.text import Tokenizer
from moe_jax.model.decoder import Stages, committed, device_weights
from moe_jax.model.experts import ExpertSource, widened
from moe_jax.prediction import predictors, recall_file, usage
from moe_jax.prediction.interface import Spec, fingerprint
from moe_jax.prediction.oracle import Oracle, recorded


def shipped(name: str) -> Path:
    """Path of something that ships with the package: "model", "predictor", "held_out" or "development"."""
    return Path(str(resources.files("moe_jax"))) / "shipped" / name


class Model:
    """A loaded model. `generate` streams text; `start` gives the whole `Generation`, `metrics` its numbers.

    Attributes:
      config: the configuration that runs (a default that does not apply is replaced, see `notes`).
      notes: what a user should know about how the model runs, one line each.
    """

    def __init__(self, config: Config):
        """Reads the checkpoint. Raises UserError naming the fix when something about it or the budget is wrong."""
        self.notes: list[str] = []
        self.config = self._without_missing_predictor(config)
        directory = Path(config.checkpoint) if config.checkpoint else shipped("model")
        self.checkpoint = open_checkpoint(directory)
        self._provide_pinned_memory()  # before anything starts jax's backend
        self.tokenizer = Tokenizer(directory)
        a = self.checkpoint.architecture
        stages = Stages(a, jnp.dtype(config.dtype))
        dense = device_weights(self.checkpoint.dense(), stages.dtype)
        predictor = self.predictor(self.config.prefetch.predictor, dense)
        if config.max_seq_len > a.max_seq_len:
            raise UserError(
                f"--config.max_seq_len={config.max_seq_len} is more than the model's {a.max_seq_len} positions;"
                " its config.json may allow more, as max_position_embeddings"
            )
        self._dense = dense
        source = self._source()
        try:
            self.engine = Engine(
                stages,
                dense,
                source,
                predictor,
                config.prefill_chunk,
                config.max_seq_len or a.max_seq_len,
                self.execution(config.execution, predictor, getattr(source, "store", None), dense),
            )
        except BaseException:
            source.close()  # its threads would keep the bank
            raise

    def _provide_pinned_memory(self) -> None:
        if self.config.offload.tier != "host":
            return
        from moe_jax.offload.pinned import provide

        a = self.checkpoint.architecture
        if note := provide(a.num_moe_layers * a.num_experts * self.checkpoint.expert_bytes):
            self.notes.append(note)

    def _without_missing_predictor(self, config: Config) -> Config:
        """The learned predictor is trained for one model; another model without one of its own runs with `router`."""
        prefetch = config.prefetch
        if not config.checkpoint or prefetch.predictor != "learned" or prefetch.checkpoint:
            return config
        self.notes.append(
            "predictor: router, as no predictor trained for this model is given"
            " (train_predictor.py makes one for --config.prefetch.checkpoint)"
        )
        return dataclasses.replace(config, prefetch=dataclasses.replace(prefetch, predictor="router"))

    def _source(self) -> ExpertSource:
        if self.config.offload.tier == "none":
            widen = jnp.dtype(self.config.dtype) if self.config.offload.upcast == "arrival" else None
            return ResidentExperts(self.checkpoint, widen)
        # Here, so that the all-resident reference never imports offload.
        from moe_jax.offload.open import open_source

        offload, dtype = self.config.offload, jnp.dtype(self.config.dtype)
        free = self._auto_budget() if offload.device_budget == "auto" else None
        return open_source(offload, self.checkpoint, dtype, free, host_memory.available, expect=self.usage)

    @functools.cached_property
    def usage(self) -> usage.Usage | None:
        """How often experts will be used, if that was trained for this model."""
        directory, a = self.predictor_directory(), self.checkpoint.architecture
        if not usage.there(directory):
            return None
        return usage.stored(directory, Spec.of(a, 1), fingerprint(a, self._dense))

    def _auto_budget(self) -> int:
        c, a = self.config, self.checkpoint.architecture
        positions, itemsize = c.max_seq_len or a.max_seq_len, jnp.dtype(c.dtype).itemsize
        stats = jax.devices()[0].memory_stats()
        if stats and "bytes_limit" in stats:
            limit, in_use = stats["bytes_limit"], stats["bytes_in_use"]
        else:  # the device is the host, and holds the bank too
            limit, in_use = host_memory.available(), 0
            if c.offload.tier == "host":
                in_use = a.num_moe_layers * a.num_experts * self.checkpoint.expert_bytes
        quantised = isinstance(self.checkpoint.expert_spec.gate_up, tuple)
        widens = quantised and jax.default_backend() != "cpu"  # there a block at a time
        reserved = reserve(a, padded(c.batch_size), positions, c.prefill_chunk, itemsize, widens)
        return auto_budget(limit, in_use, reserved)

    def predictor_directory(self) -> str:
        """Where the trained predictor is; empty: there is none."""
        return self.config.prefetch.checkpoint or ("" if self.config.checkpoint else str(shipped("predictor")))

    def predictor(self, name: str, dense: Any) -> tuple[Any, Any, Any] | None:
        """The predictor of that name with its spec and parameters, as this configuration wants it; None for "none"."""
        a = self.checkpoint.architecture
        if name == Oracle.name:
            return None  # `start` records what it replays
        horizon = min(self.config.prefetch.horizon, a.num_moe_layers)  # further ahead every layer has been seen
        return predictors.load(name, horizon, self.predictor_directory(), a, dense)

    def execution(self, mode: str, predictor: Any, store: Any, dense: Any, share: int = 1) -> Execution | None:
        """An execution mode with this configuration's settings.

        Args:
          predictor: with its spec and parameters, or None.
          store: of the experts on the device, or None; its capacity counts `share` times.

        Raises:
          UserError: what the mode needs is missing.
        """
        recall = None
        if mode == "hybrid" and predictor:
            identity = fingerprint(self.checkpoint.architecture, dense)
            recall = recall_file.stored(self.predictor_directory(), identity, predictor[0].name)
        return execution.make(
            mode,
            self.checkpoint.architecture,
            dense,
            predictor and predictor[0],
            recall=recall,
            threshold=self.config.speculation.threshold,
            bonus=self.config.speculation.bonus,
            capacity=store and store.capacity * share,
        )

    def start(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        chat: str | None = None,
    ) -> Generation:
        """Tokenizes, compiles what is missing, and returns a `Generation` that has not begun.

        Args:
          prompts: one text per row.
          max_new_tokens: most tokens to generate for each.
          sampling: how tokens are drawn; None is greedy.
          chat: None for plain text; otherwise prompts are user messages after this system message (may be empty).

        Raises:
          UserError: no prompt, an empty or too long one.
        """
        if not prompts:
            raise UserError("no prompt; give --prompt, --prompt_file or text on standard input")
        if any(not prompt for prompt in prompts):
            raise UserError("the prompt is empty; write some text after --prompt=")
        if max_new_tokens < 1:
            raise UserError(f"--max_new_tokens must be at least 1, not {max_new_tokens}")
        if chat is None:
            ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        else:
            system = [{"role": "system", "content": chat}] if chat else []
            ids = [self.tokenizer.apply_chat([*system, {"role": "user", "content": p}]) for p in prompts]
        size = self.config.batch_size
        sampling = sampling or Sampling()
        compile_s = 0.0
        if self.config.prefetch.predictor == Oracle.name:
            compile_s = self._record_oracle(prompts, ids, max_new_tokens, sampling)
        began = time.perf_counter()
        self._compile(ids, max_new_tokens)
        generation = Generation(self.engine, self.tokenizer, prompts, ids, max_new_tokens, sampling, size)
        generation.compile()
        generation.compile_s = compile_s + time.perf_counter() - began
        return generation

    def _compile(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        size, spec = self.config.batch_size, self.checkpoint.expert_spec
        if self.config.offload.upcast == "arrival":
            spec = jax.eval_shape(lambda expert: widened(expert, self.engine.stages.dtype), spec)
        example = committed(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec))
        for start in range(0, len(ids), size):
            lengths = [len(prompt) for prompt in ids[start : start + size]]
            compile_for(self.engine, lengths, max_new_tokens, example)

    def _record_oracle(
        self, prompts: Sequence[str], ids: Sequence[list[int]], max_new_tokens: int, sampling: Sampling
    ) -> float:
        """Runs the request without a predictor; the engine then predicts, from a fresh source, what that run routed.

        Returns seconds spent compiling.
        """
        if len(ids) > self.config.batch_size:
            raise UserError(f"the oracle replays one batch: set --config.batch_size={len(ids)}, or give fewer prompts")
        self.engine.use_predictor(None)
        began = time.perf_counter()
        self._compile(ids, max_new_tokens)
        compile_s = time.perf_counter() - began
        rehearsal = Generation(
            self.engine, self.tokenizer, prompts, ids, max_new_tokens, sampling, self.config.batch_size
        )
        for _ in rehearsal:
            pass
        self.engine.source.close()
        del self.engine.source  # freed before the next one is loaded: never two copies
        self.engine.source = self._source()
        if rehearsal.record.active:  # otherwise nothing is decoded, and nothing predicted
            a = self.checkpoint.architecture
            spec = Spec.of(a, min(self.config.prefetch.horizon, a.num_moe_layers))
            params = Oracle.replay(spec, recorded(rehearsal.record.ids, a.num_moe_layers))
            self.engine.use_predictor((Oracle(), spec, params))
        return compile_s

    def generate(self, prompt: str, max_new_tokens: int = 128, sampling: Sampling | None = None) -> Iterator[str]:
        """Streams the continuation of one prompt, piece by piece."""
        for _, piece in self.start([prompt], max_new_tokens, sampling):
            yield piece

    def metrics(self, generation: Generation, bounds: bool = True) -> dict[str, Any]:
        """Every number of design.md for what `generation` has done so far; null where it does not apply.

        `bounds`: measure them too, which needs a bank that can be read.
        """
        return metrics.measure(generation, self.config.offload.link_gbps, bounds)

    def close(self) -> None:
        """Stops background work."""
        self.engine.source.close()

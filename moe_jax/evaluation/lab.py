"""`Lab`: one model opened once, and whatever it takes to run a request with it in any mode, one run at a time.

Weights, executables and (on the host tier) the bank are shared; a source lives as long as one run, so that never more
than one budget is filled, and every run starts from the same empty store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.evaluation.modes import BASELINE, Mode
from moe_jax.evaluation.reader import DiskReader
from moe_jax.inference import bounds, metrics
from moe_jax.inference.compilation import compile_for
from moe_jax.inference.engine import Engine
from moe_jax.inference.generate import Generation
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.session import Model
from moe_jax.inference.state import Record
from moe_jax.model.decoder import committed
from moe_jax.model.experts import ExpertWeights, Key, widened
from moe_jax.offload.bank import HostBank
from moe_jax.offload.open import open_source
from moe_jax.offload.source import OffloadedExperts
from moe_jax.prediction import predictors
from moe_jax.prediction.interface import Spec
from moe_jax.prediction.oracle import Oracle, recorded


@dataclasses.dataclass
class Request:
    """A batch of prompts, and what it is known to give: any mode gives the same."""

    prompts: list[list[int]]
    record: Record
    token_ids: list[list[int]]


@dataclasses.dataclass
class Measured:
    """One run of one mode. Figures of `summary` are those of `Trace.summary`; None without transfers."""

    step_s: list[float]
    ttft_s: float
    recall: float | None
    summary: dict[str, Any] | None = None
    loads: int | None = None  # during the decode steps, of any kind

    @property
    def mean_s(self) -> float:
        return float(np.mean(self.step_s))


class Lab:
    """Args:
    config: its budget, predictor and policy do not matter: modes bring theirs.
    resident: whether every expert may be held on the device.
    new_tokens: that every run generates, unless its text ends before.
    sampling: how they are drawn; every run of a request draws the same.
    """

    def __init__(self, config: Config, resident: bool, new_tokens: int, sampling: Sampling):
        if config.offload.tier == "none":
            raise UserError("benchmark.py compares with offloading: use --config.offload.tier=host")
        offload = dataclasses.replace(config.offload, tier="none") if resident else config.offload
        self.config, self.new_tokens, self.resident, self.sampling = config, new_tokens, resident, sampling
        prefetch = dataclasses.replace(config.prefetch, predictor="none")
        self.model = Model(dataclasses.replace(config, offload=offload, prefetch=prefetch))
        self._engines: dict[Mode, Engine] = {}
        self._bank = HostBank(self.model.checkpoint) if config.offload.tier == "host" else None
        self._expert_bytes: dict[str | None, int] = {}
        with contextlib.closing(self._open(Mode(BASELINE), "100%", None)) as source:
            self.link_bytes = source.bank.link_bytes
        self.expert_bytes = self.bytes_of(Mode(BASELINE))

    @property
    def architecture(self):
        """Of the model."""
        return self.model.checkpoint.architecture

    def bytes_of(self, mode: Mode) -> int:
        """Of one expert in the mode's budget."""
        if mode.upcast not in self._expert_bytes:
            with contextlib.closing(self._open(mode, "100%", None)) as source:
                self._expert_bytes[mode.upcast] = source.store.expert_bytes
        return self._expert_bytes[mode.upcast]

    def rehearse(self, prompts: list[list[int]]) -> Request:
        """Runs a batch of prompts once, and keeps what it routed and generated."""
        generation = self._generation(self.model.engine, prompts)
        for _ in generation:
            pass
        if not generation.record.active:
            raise UserError("a prompt ends its text at once; give another --prompt")
        return Request(prompts, generation.record, [o.token_ids for o in generation.outputs])

    def run(self, mode: Mode, request: Request, budget_bytes: int) -> Measured:
        """One run; checks that it generates what the rehearsal did."""
        engine = self._engine(mode, request)
        source = None if mode.resident else self._open(mode, f"{budget_bytes}B", request)
        engine.source = source or engine.source
        try:
            generation = self._generation(engine, request.prompts, mode.upcast)
            gc.collect()
            for _ in generation:
                pass
            found = [output.token_ids for output in generation.outputs]
            if found != request.token_ids:
                raise AssertionError(f"mode {mode.name} generates {found}, the rehearsal gave {request.token_ids}")
            timing, layers = generation.timing, self.architecture.num_moe_layers
            measured = Measured(timing.step_s, timing.ttft_s[0], metrics.recall(generation.record, layers))
            if source is not None:
                measured.summary = generation.trace.summary()
                measured.loads = measured.summary["loads"]
            return measured
        finally:
            if source is not None:
                source.close()
                engine.source = self.model.engine.source

    def replay(self, request: Request) -> bounds.Replay:
        """The executables of the request's decode steps, with every expert resident if the lab has them all."""
        return bounds.Replay(self.model.engine, request.record, self._weights())

    def mover(self) -> tuple[Callable[[Key], None], Callable[[], None]]:
        """Brings one expert over the link that the modes use, and drops it; and what ends its use."""
        if self._bank is None:
            reader = DiskReader(self.model.checkpoint)  # pyright: ignore[reportArgumentType]  the disk tier needs it
            return reader.move, reader.close
        bank, gbps, link = self._bank, self.config.offload.link_gbps, threading.Lock()

        def move(key: Key) -> None:
            if not gbps:
                jax.block_until_ready(bank.copy(key))
                return
            with link:
                ends = time.perf_counter() + self.link_bytes / (gbps * 1e9)
                jax.block_until_ready(bank.copy(key))
                time.sleep(max(0.0, ends - time.perf_counter()))

        return move, lambda: None

    def predictor_seconds(self, mode: Mode, batch: int) -> float | None:
        """What the predictions of one token cost alone."""
        engine = self._engines.get(mode)
        return bounds.predictor_seconds(engine, batch) if engine else None

    def close(self) -> None:
        """Drops the model."""
        self.model.close()

    def _generation(self, engine: Engine, prompts: list[list[int]], upcast: str | None = None) -> Generation:
        spec = self.model.checkpoint.expert_spec
        if (upcast or self.config.offload.upcast) == "arrival":
            spec = jax.eval_shape(lambda expert: widened(expert, engine.stages.dtype), spec)
        example = committed(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec))
        compile_for(engine, [len(prompt) for prompt in prompts], self.new_tokens, example)
        texts = [""] * len(prompts)
        return Generation(
            engine, self.model.tokenizer, texts, prompts, self.new_tokens, self.sampling, batch_size=len(prompts)
        )

    def _engine(self, mode: Mode, request: Request) -> Engine:
        if mode not in self._engines:
            base = self.model.engine
            self._engines[mode] = Engine(
                base.stages,
                base.dense,
                base.source,
                self._predictor(mode, request),
                base.prefill_chunk,
                base.max_seq_len,
            )
        elif mode.predictor == Oracle.name:
            forecast = self._engines[mode].forecast
            assert forecast is not None
            forecast.use_parameters(self._predictor(mode, request)[2])
        return self._engines[mode]

    def _predictor(self, mode: Mode, request: Request) -> Any:
        base, prefetch, a = self.model.engine, self.config.prefetch, self.architecture
        horizon = min(mode.horizon or prefetch.horizon, a.num_moe_layers)
        if mode.predictor == Oracle.name:
            spec = Spec.of(a, horizon)
            return Oracle(), spec, Oracle.replay(spec, recorded(request.record.ids, a.num_moe_layers))
        return predictors.load(mode.predictor, horizon, self.model.predictor_directory(), a, base.dense)

    def _open(self, mode: Mode, budget: str, request: Request | None) -> OffloadedExperts:
        uses = bounds.uses_in_order(request.record, self.architecture.num_moe_layers) if request else []
        future = [key for key, _ in uses]
        config = dataclasses.replace(self.config.offload, device_budget=budget, policy=mode.policy)
        config = dataclasses.replace(config, upcast=mode.upcast or config.upcast)
        dtype = jnp.dtype(self.config.dtype)
        return open_source(config, self.model.checkpoint, dtype, None, None, self._bank, future, self.model.usage)

    def _weights(self) -> Callable[[int, int], ExpertWeights]:
        source = self.model.engine.source
        if isinstance(source, OffloadedExperts):
            held = source.resident()
            # Which weights does not matter to the time, as long as they are spread as those that ran.
            return lambda layer, expert: held[(layer * self.architecture.num_experts + expert) % len(held)]
        return lambda layer, expert: source.take(layer, [expert])[0]

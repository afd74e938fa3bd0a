"""The Python API: `load` a model with its tokenizer, expert source and predictor, then `generate`."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.inference import bounds
from moe_jax.inference.engine import Engine
from moe_jax.inference.generate import Generation
from moe_jax.inference.resident import ResidentExperts
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.text import Tokenizer
from moe_jax.model.decoder import Stages, device_weights
from moe_jax.model.experts import ExpertSource, ExpertWeights


def shipped(name: str) -> Path:
    """Path of something that ships with the package: "model", "predictor" or "held_out"."""
    return Path(str(resources.files("moe_jax"))) / "shipped" / name


class Model:
    """A loaded model. `generate` streams text; `start` gives the whole `Generation` with its numbers."""

    def __init__(self, config: Config):
        self.config = config
        self.directory = Path(config.checkpoint) if config.checkpoint else shipped("model")
        self.checkpoint = HFCheckpoint(self.directory)
        self.tokenizer = Tokenizer(self.directory)
        a = self.checkpoint.architecture
        stages = Stages(a, jnp.dtype(config.dtype))
        dense = device_weights(self.checkpoint.dense(), stages.dtype)
        self.compile_s = 0.0
        self.engine = Engine(
            stages,
            dense,
            self._source(),
            self._predictor(dense),
            config.prefill_chunk,
            min(config.max_seq_len or a.max_seq_len, a.max_seq_len),
        )

    def _source(self) -> ExpertSource:
        if self.config.offload.tier == "none":
            return ResidentExperts(self.checkpoint)
        # The all-resident reference never imports offload.
        from moe_jax.offload.bank import HostBank
        from moe_jax.offload.source import OffloadedExperts, parse_budget

        a, offload = self.checkpoint.architecture, self.config.offload
        total = a.num_moe_layers * a.num_experts * self.checkpoint.expert_bytes
        budget = parse_budget(offload.device_budget, total, _free_bytes() if offload.device_budget == "auto" else None)
        check_budget(budget, a, self.checkpoint.expert_bytes)
        return OffloadedExperts(HostBank(self.checkpoint), a, budget, link_gbps=offload.link_gbps)

    def _predictor(self, dense: Any) -> tuple[Any, Any, Any] | None:
        from moe_jax.prediction import predictors

        prefetch = self.config.prefetch
        return predictors.load(
            prefetch.predictor,
            prefetch.horizon,
            prefetch.checkpoint or (str(shipped("predictor")) if not self.config.checkpoint else ""),
            self.checkpoint.architecture,
            dense,
        )

    def start(
        self, prompts: Sequence[str], max_new_tokens: int = 128, sampling: Sampling | None = None, chat: str | None = None
    ) -> Generation:
        """Tokenizes, compiles what is missing, and returns a `Generation` that has not begun.

        Args:
          prompts: one text per row.
          chat: None for plain text; otherwise prompts are user messages after this system message (may be empty).

        Raises:
          UserError: no prompt, an empty or too long one.
        """
        if not prompts:
            raise UserError("no prompt; give --prompt, --prompt_file or text on standard input")
        if max_new_tokens < 1:
            raise UserError(f"--max_new_tokens must be at least 1, not {max_new_tokens}")
        if any(not prompt.strip() for prompt in prompts):
            raise UserError("the prompt is empty; write some text after --prompt=")
        if chat is None:
            ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        else:
            system = [{"role": "system", "content": chat}] if chat else []
            ids = [self.tokenizer.apply_chat([*system, {"role": "user", "content": p}]) for p in prompts]
        size = self.config.batch_size
        for start in range(0, len(ids), size):
            self.compile_s += self.engine.compile([len(i) for i in ids[start : start + size]], max_new_tokens, self._zeros())
        return Generation(self.engine, self.tokenizer, prompts, ids, max_new_tokens, sampling or Sampling(), size)

    def generate(self, prompt: str, max_new_tokens: int = 128, sampling: Sampling | None = None) -> Iterator[str]:
        """Streams the continuation of one prompt, piece by piece."""
        for _, piece in self.start([prompt], max_new_tokens, sampling):
            yield piece

    def close(self) -> None:
        """Stops background work."""
        self.engine.source.close()

    def _zeros(self) -> ExpertWeights:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.checkpoint.expert_spec)

    # ---- numbers -----------------------------------------------------------------------------------------------

    def metrics(self, generation: Generation) -> dict[str, Any]:
        """Every number of design.md for what `generation` has done so far; null where it does not apply."""
        timing, record, source = generation.timing, generation.record, self.engine.source
        steps = np.array(timing.step_s)
        tokens = sum(len(output.token_ids) for output in generation.outputs)
        tpot = {name: float(np.percentile(steps, q)) for name, q in (("median", 50), ("p90", 90), ("p99", 99))}
        result: dict[str, Any] = {
            "compile_s": self.compile_s,
            "ttft_s": float(np.median(timing.ttft_s)) if timing.ttft_s else None,
            "tpot_s": tpot if len(steps) else dict.fromkeys(("median", "p90", "p99")),
            "tokens_per_s": tokens / timing.total_s if timing.total_s else None,
            "needed": dict.fromkeys(("cached", "prefetched", "late", "missed")),
            "hit_rate": None,
            "recall": self._recall(generation),
            "ready_recall": None,
            "bytes_per_token": dict.fromkeys(("demand", "speculative_used", "speculative_wasted")),
            "stall_s_per_token": None,
            "predictor_s_per_token": None,
            **dict.fromkeys(("bound_overlap_s", "bound_serial_s", "overlap_share")),
            "peak_device_cache_bytes": None,
            "device_budget_bytes": None,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if self.config.offload.tier != "none":
            result.update(source.trace.summary())  # pyright: ignore[reportAttributeAccessIssue]
            result["device_budget_bytes"] = source.budget_bytes  # pyright: ignore[reportAttributeAccessIssue]
        if len(steps):
            result["predictor_s_per_token"] = bounds.predictor_seconds(self.engine, len(record.active[0]))
            if self.config.offload.tier != "none":
                result.update(self._bounds(generation, float(np.median(steps))))
        return result

    def _recall(self, generation: Generation) -> float | None:
        """Recall of the prediction one layer ahead (not wrapped): top-U of its ranking against the U needed experts."""
        record, layers = generation.record, self.engine.architecture.num_moe_layers
        pairs = [
            (set(np.argsort(-record.predicted[i], kind="stable")[: len(needed)].tolist()), set(needed))
            for i, needed in enumerate(record.needed[1:])
            if i < len(record.predicted) and (i + 1) % layers
        ]
        return float(np.mean([len(guess & true) / len(true) for guess, true in pairs])) if pairs else None

    def _bounds(self, generation: Generation, measured: float) -> dict[str, Any]:
        source: Any = self.engine.source
        record, a = generation.record, self.engine.architecture
        pool = source.resident()
        pick = lambda layer, expert: pool.get((layer, expert)) or pool[keys[(layer * a.num_experts + expert) % len(keys)]]
        keys = list(pool)
        capacity = self.engine.shapes([len(o.prompt_token_ids) for o in generation.outputs[: generation.batch_size]], generation.max_new_tokens)[2]
        compute = bounds.replay(self.engine, record, pick, capacity)
        loads = bounds.lru_loads(record, a.num_moe_layers, source.budget_bytes // source.expert_bytes)
        transfer = loads * source.expert_bytes / len(record.active) / source.link_bytes_per_s()
        return {
            "bound_overlap_s": max(compute, transfer),
            "bound_serial_s": compute + transfer,
            "overlap_share": bounds.overlap_share(compute, transfer, measured),
        }


def load(checkpoint: str = "", **overrides: Any) -> Model:
    """Loads a model: `load()` is the shipped one with a learned predictor and 25% of its experts on the device.

    Args:
      checkpoint: a Hugging Face directory, or empty for the shipped model.
      **overrides: fields of `moe_jax.config.Config`, e.g. `dtype="bfloat16"`, `offload={"tier": "none"}`.
    """
    return Model(Config.from_dict({"checkpoint": checkpoint, **overrides}))

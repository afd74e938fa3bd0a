"""What execution modes cost in quality and gain in speed: text read through decode steps, and greedy generations.

A prompt is prefilled exactly in every mode, so quality is measured where modes act: every token of a text but the first
enters by a decode step of its own. Several windows of a text decode together, which changes nothing for any of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.evaluation import paired
from moe_jax.inference import execution, metrics
from moe_jax.inference.engine import Engine
from moe_jax.inference.resident import ResidentExperts
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.session import Model
from moe_jax.inference.state import DecodeState, Record
from moe_jax.model.architecture import Routing
from moe_jax.model.decoder import Routed
from moe_jax.model.experts import ExpertSource
from moe_jax.model.platforms import reproducible
from moe_jax.offload.source import OffloadedExperts
from moe_jax.trace import Trace

Progress = Callable[[int], None]
"""Told how many units of work are done."""


@dataclasses.dataclass
class Way:
    """One way to run the model: an execution mode with a predictor, or without ("none")."""

    mode: str
    predictor: str
    quality: Engine  # for texts, in batches
    speed: Engine  # for generation, one prompt at a time
    trace: Trace = dataclasses.field(default_factory=Trace)
    step_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def reads_like(self) -> tuple[str, str]:
        """Ways that are equal in this compute the same: only what modes run depends on a predictor."""
        return (self.mode, "none" if self.mode in ("exact", "cache_aware") else self.predictor)


def ways(
    model: Model, modes: Sequence[str], names: Sequence[str], rows: int, unmeasured: Collection[str] = ()
) -> list[Way]:
    """Every mode with every predictor that makes sense, over the model's own store; first of all `exact`.

    Args:
      model: loaded with experts off the device.
      names: predictors; "none" is left out where a mode needs one.
      rows: windows that decode together.
      unmeasured: predictors that `hybrid` is left out for.

    Raises:
      UserError: a mode or predictor that is unknown, lacks something, or the experts are all on the device.
    """
    base, source = model.engine, model.engine.source
    if not isinstance(source, OffloadedExperts):
        raise UserError("bytes and times of execution modes need experts off the device: --config.offload.tier=host")
    reading = reading_source(model)
    loaded = {name: model.predictor(name, base.dense) for name in names}
    found = []
    for mode in dict.fromkeys(["exact", *modes]):
        for name in names:
            if name == "none" and mode in execution.PREDICTIVE or mode == "hybrid" and name in unmeasured:
                continue
            engines = [
                Engine(
                    base.stages,
                    base.dense,
                    experts,
                    loaded[name],
                    base.prefill_chunk,
                    base.max_seq_len,
                    model.execution(mode, loaded[name], source.store, base.dense, share),
                )
                # The rows of a batch share the budget; windows that only decode together for speed do not.
                for experts, share in ((reading, rows), (source, 1))
            ]
            found.append(Way(mode, name, engines[0], engines[1]))
    return found


def reading_source(model: Model) -> ExpertSource:
    """Where texts are read from: all experts on the device if they are few, as a batch needs nearly all at each step.

    What modes run does not depend on it.
    """
    a, spec = model.checkpoint.architecture, model.checkpoint.expert_spec
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(spec))
    few = a.num_moe_layers * a.num_experts * size <= RESIDENT_BYTES
    return ResidentExperts(model.checkpoint) if few else model.engine.source


RESIDENT_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of one way on one text, over all tokens but the first two of each window (the first is the prompt)."""

    tokens: int
    perplexity: float
    perplexity_ratio: float  # to exact
    kl: float  # mean of KL(exact || this), nats
    same_choice: float  # share of tokens where both find the same token most probable
    departed: float | None  # share of (token, layer) that ran other experts than the true router's


def read(
    chosen: Sequence[Way], windows: np.ndarray, rows: int, progress: Progress = lambda done: None
) -> list[Quality]:
    """Reads one text in all ways, step by step side by side; the first is the exact one.

    Args:
      windows: int32 [W, T] token ids.
      rows: windows that decode together, a power of two.
    """
    W, T = windows.shape
    sums = np.zeros((len(chosen), 4))
    departures: list[list[tuple[float, int]]] = [[] for _ in chosen]  # of each batch, and its windows
    for start in range(0, W, rows):
        part = windows[start : start + rows]
        counted = np.arange(rows) < len(part)
        # A last batch of fewer windows is filled up, so that every row has the same share of the budget.
        part = np.concatenate([part, np.repeat(part[:1], rows - len(part), axis=0)])
        states: list[DecodeState] = []
        for way in chosen:
            state = way.quality.prefill(part[:, :1].tolist(), T)[1]
            state.active = state.active & np.pad(counted, (0, len(state.active) - rows))
            states.append(state)
            way.quality.record = Record()
        try:
            for position in range(1, T - 1):
                tokens = _padded(part[:, position], states[0])
                logits = [way.quality.decode(tokens, state) for way, state in zip(chosen, states, strict=True)]
                targets = _padded(part[:, position + 1], states[0])
                weights = np.pad(counted, (0, len(tokens) - rows)).astype(np.float32)
                for i, other in enumerate(logits):
                    sums[i] += np.asarray(score(logits[0], other, targets, weights))
                progress(start * T + position * rows)
        finally:
            for way, found in zip(chosen, departures, strict=True):
                record, way.quality.record = way.quality.record, None
                if record is not None and (share := metrics.departed(record)) is not None:
                    found.append((share, int(counted.sum())))
    return [_quality(total, sums[0], found) for total, found in zip(sums, departures, strict=True)]


def _quality(total: np.ndarray, exact: np.ndarray, departures: list[tuple[float, int]]) -> Quality:
    kl, nats, same, count = total
    shares, windows = zip(*departures, strict=True) if departures else ((), ())
    return Quality(
        int(count),
        math.exp(nats / count),
        math.exp((nats - exact[1]) / count),
        float(kl / count),
        float(same / count),
        float(np.average(shares, weights=windows)) if departures else None,
    )


def _padded(column: np.ndarray, state: DecodeState) -> np.ndarray:
    return np.pad(column.astype(np.int32), (0, len(state.lengths) - len(column)))


class _Watching(execution.Planned):
    """Runs exactly, and counts how many of the router's experts had been predicted for each layer."""

    def __init__(self, routing: Routing, num_layers: int):
        super().__init__(routing, [False] * num_layers, predicted_gates=False)
        self.hits, self.asked = np.zeros(num_layers), np.zeros(num_layers)

    def decide(
        self, layer: int, routed: Routed, plan: execution.Plan | None, memory: Any, active: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        true = np.asarray(routed.ids)
        if plan is not None:
            guessed = np.asarray(plan.ids)
            self.hits[layer] += sum(len(set(t) & set(g)) for t, g in zip(true[active], guessed[active], strict=True))
            self.asked[layer] += true[active].size
        return routed.ids, routed.gates


def recall_by_layer(
    model: Model, name: str, windows: np.ndarray, rows: int, progress: Progress = lambda done: None
) -> list[float | None]:
    """Recall@K of what is predicted one layer before, of exact decode steps; None where nothing is predicted."""
    base, a = model.engine, model.checkpoint.architecture
    watching = _Watching(a.routing, a.num_moe_layers)
    engine = Engine(
        base.stages,
        base.dense,
        reading_source(model),
        model.predictor(name, base.dense),
        base.prefill_chunk,
        execution=watching,
    )
    read([Way("exact", name, engine, engine)], windows, rows, progress)
    return [float(h / n) if n else None for h, n in zip(watching.hits, watching.asked, strict=True)]


@reproducible()
def score(p: jax.Array, q: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sums over rows of KL(p || q), -log q of the target, equal choices, and 1, from logits [B, V]."""
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    nats = -jnp.take_along_axis(log_q, targets[:, None], axis=1)[:, 0]
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)
    same = (p.argmax(1) == q.argmax(1)).astype(jnp.float32)
    return jnp.stack([kl, nats, same, jnp.ones_like(same)]) @ weights


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of one way, over greedy generations of one prompt at a time; bytes per token, on average."""

    tpot_s: float  # median
    hit_rate: float | None
    waited_bytes: float  # of needed experts that were not there: missed and late
    demand_bytes: float
    speculative_bytes: float
    stall_s: float
    agreement: float  # new tokens until the text leaves that of exact mode, on average
    new_tokens: float  # that exact mode generated, on average: fewer than asked for where a text ended


def generate(
    model: Model,
    chosen: Sequence[Way],
    prompts: Sequence[str],
    new_tokens: int,
    progress: Progress = lambda done: None,
) -> list[Speed]:
    """Continues every prompt greedily in all ways, in turn, so that what disturbs the machine disturbs all alike.

    Each starts with an empty store that remembers nothing: the way before had the same text.

    Args:
      chosen: the first is the exact one.
      new_tokens: most to generate after each prompt; a text may end before.
    """
    source = model.engine.source
    assert isinstance(source, OffloadedExperts)
    same: list[list[int]] = [[] for _ in chosen]
    lengths: list[int] = []
    original = model.engine
    try:
        for turn, prompt in enumerate([prompts[0], *prompts]):  # the first turn warms up
            written: dict[int, list[int]] = {}
            for i, way in paired.rotated([*enumerate(chosen)], turn):
                model.engine = way.speed
                source.forget()
                generation = model.start([prompt], new_tokens, Sampling())
                generation.trace = way.trace if turn else Trace()
                for _ in generation:
                    pass
                written[i] = generation.outputs[0].token_ids
                if turn:
                    way.step_s += generation.timing.step_s
                progress(turn * len(chosen) + len(written))
            if turn:
                lengths.append(len(written[0]))
                for i, found in enumerate(same):
                    found.append(_common(written[0], written[i]))
    finally:
        model.engine = original
    size, length = source.store.expert_bytes, float(np.mean(lengths))
    return [_speed(way, found, size, length) for way, found in zip(chosen, same, strict=True)]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _speed(way: Way, same: list[int], expert_bytes: int, new_tokens: float) -> Speed:
    if not way.step_s:
        raise UserError(
            "the model ends its text at once after every prompt, so there is nothing to time; give other texts"
        )
    summary = way.trace.summary()
    moved = summary["bytes_per_token"]
    waited = sum(outcome in ("missed", "late") for s in way.trace.steps() if s.token >= 0 for outcome in s.outcomes)
    return Speed(
        float(np.median(way.step_s)),
        summary["hit_rate"],
        waited * expert_bytes / summary["tokens"],
        moved["demand"],
        moved["speculative_used"] + moved["speculative_wasted"],
        summary["stall_s_per_token"],
        float(np.mean(same)),
        new_tokens,
    )


def row(way: Way, by_text: dict[str, Quality], speed: Speed) -> dict[str, Any]:
    """For JSON; `mean` is over all tokens of all texts."""
    tokens = sum(quality.tokens for quality in by_text.values())
    mean = lambda f: sum(f(quality) * quality.tokens for quality in by_text.values()) / tokens
    departs = all(quality.departed is not None for quality in by_text.values())
    overall = Quality(
        tokens,
        math.exp(mean(lambda q: math.log(q.perplexity))),
        math.exp(mean(lambda q: math.log(q.perplexity_ratio))),
        mean(lambda q: q.kl),
        mean(lambda q: q.same_choice),
        mean(lambda q: q.departed) if departs else None,
    )
    return {
        "mode": way.mode,
        "predictor": way.predictor,
        "quality": dataclasses.asdict(overall),
        "by_text": {name: dataclasses.asdict(quality) for name, quality in by_text.items()},
        "speed": dataclasses.asdict(speed),
    }

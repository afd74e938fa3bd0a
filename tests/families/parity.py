"""Random tiny models of `transformers` against ours. A family's test file is a table of `Case`s over this module.

Each case is built once: weights so large that every feature moves the logits, saved as a checkpoint, read back by
`HFCheckpoint` and converted, and run by `transformers` in float32. All of the prompt goes through the checkpoint as it
is;
prefill and decode go through the converted one and a host bank of a third of the experts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.checkpoint.convert import convert
from moe_jax.checkpoint.hf import HFCheckpoint
from moe_jax.inference import bounds
from moe_jax.inference.engine import Engine
from moe_jax.inference.state import Record
from moe_jax.model.architecture import Architecture
from moe_jax.model.decoder import Stages, device_weights
from moe_jax.model.experts import ExpertWeights, run_expert
from moe_jax.model.layers import MODULES, Decoder, abstract_dense
from moe_jax.model.primitives import linear
from moe_jax.model.rope import rope_table
from moe_jax.offload.bank import HostBank
from moe_jax.offload.source import OffloadedExperts
from moe_jax.prediction import predictors

NEW_TOKENS = 32
PROMPTS = (37, 9, 1)  # tokens; with the new ones longer than every window and original length of the tables
SAME = 1e-4  # of the logits' scale: what rounding may do
MOVED = 1e-2  # of the logits' scale: what a feature must at least do


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One tiny model.

    Attributes:
      name: of the case, in the test's id.
      config: arguments of the configuration class of `transformers`.
      without: what happens to the architecture when a feature is disabled; each must move the logits.
      fused: saved as `transformers` holds it in memory, all experts of a layer in one tensor.
      save: (model, directory) saves it in another way, and gives back the model that is then in the directory.
    """

    name: str
    config: Any
    without: dict[str, Callable[[Architecture], Architecture]] = dataclasses.field(default_factory=dict)
    fused: bool = False
    save: Callable[[Any, Path], Any] | None = None

    def __str__(self) -> str:
        return self.name


def without(**changes: Any) -> Callable[[Architecture], Architecture]:
    """The architecture with fields replaced; a dict replaces fields of a field, a function maps it."""

    def change(value: Any, new: Any) -> Any:
        if isinstance(new, dict):
            return dataclasses.replace(value, **{name: change(getattr(value, name), x) for name, x in new.items()})
        return new(value) if callable(new) else new

    return lambda a: change(a, changes)


def no_windows(a: Architecture) -> Architecture:
    """Every layer sees everything before it."""
    return dataclasses.replace(a, layers=tuple(dataclasses.replace(kind, window=None) for kind in a.layers))


@functools.cache
def subject(case: Case) -> Subject:
    """The case's model; built once in a process."""
    return Subject(case)


class Subject:
    """A model of `transformers`, its checkpoint, and what we read from it."""

    def __init__(self, case: Case):
        import torch
        import transformers

        torch.set_num_threads(1)
        with torch.random.fork_rng():
            torch.manual_seed(sum(map(ord, case.name)))
            model: Any = transformers.AutoModelForCausalLM.from_config(
                case.config, attn_implementation="eager", experts_implementation="eager"
            )
            model = model.to(torch.float32).eval()
            randomise(model)
        self.folder = tempfile.TemporaryDirectory()
        directory = Path(self.folder.name)
        if case.save:
            model = case.save(model, directory).eval()
        else:
            model.save_pretrained(directory)
        self.model = model
        if case.fused:
            from safetensors.torch import save_file

            shared = {"lm_head.weight"} if case.config.tie_word_embeddings else set()
            named = {name: x.contiguous() for name, x in model.state_dict().items() if name not in shared}
            save_file(named, directory / "model.safetensors")
        self.checkpoint = HFCheckpoint(directory)
        self.architecture = self.checkpoint.architecture
        self.dense = self.checkpoint.dense()
        self.converted = convert(self.checkpoint, directory.with_name(directory.name + "-converted"))
        self.converted_folder = weakref.finalize(self, shutil.rmtree, self.converted.directory)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(0, case.config.vocab_size, n).tolist() for n in PROMPTS]

    def theirs(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Float32 logits [T, V], and the ids and gates of every layer with experts [L, T, K], by expert id."""
        import torch

        seen: list[Any] = []
        routers = [m for m in self.model.modules() if re.search("top_?k_?router$", type(m).__name__, re.IGNORECASE)]
        assert len(routers) == self.architecture.num_moe_layers
        hooks = [router.register_forward_hook(lambda _m, _i, out: seen.append(out[-2:])) for router in routers]
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0].numpy()
        for hook in hooks:
            hook.remove()
        gates, ids = (np.stack([x.reshape(len(tokens), -1).numpy() for x in xs]) for xs in zip(*seen, strict=True))
        return logits, *by_id(ids, gates)

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """Our logits [T, V] of the first prompt, every expert on every token."""
        return self.dense_forward(self.architecture)

    def dense_forward(self, a: Architecture) -> np.ndarray:
        """Logits [T, V] of the first prompt under an architecture that has no more weights than this one."""
        like = abstract_dense(a)
        experts = [
            jax.tree.map(lambda *x: np.stack(x), *(self.checkpoint.expert(layer, e) for e in range(a.num_experts)))
            for layer in range(a.num_moe_layers)
        ]
        if not a.experts.bias:
            experts = [w._replace(gate_up_bias=None, down_bias=None) for w in experts]
        with jax.default_matmul_precision("float32"):  # accelerators would round the factors
            return np.asarray(dense_forward(a, _restricted(self.dense, like), experts, np.asarray(self.prompts[0])))


def randomise(model: Any) -> None:
    """Large weights: every projection keeps the scale of its input or doubles it, norms and biases differ."""
    import torch

    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        with torch.no_grad():
            noise = torch.randn(x.shape)
            if "inv_freq" in name:
                continue
            if "norm" in name:
                x.copy_(1 + 0.4 * noise)
            elif "embed" in name:
                x.copy_(noise)
            elif name.endswith("correction_bias"):
                x.copy_(0.3 * noise)
            elif x.ndim == 1 or name.endswith("bias"):
                x.copy_(0.5 * noise)
            else:
                x.copy_(noise * 1.5 * x.shape[-1] ** -0.5)


@functools.partial(jax.jit, static_argnums=0)
def dense_forward(a: Architecture, dense: Any, experts: list[ExpertWeights], tokens: jax.Array) -> jax.Array:
    """The whole model in one call, without grouping, stages or sources: tokens int32 [T] to logits [T, V]."""
    decoder = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Decoder(a, rngs=nnx.Rngs(0)))), dense)
    T = tokens.shape[0]
    kv = tuple(jnp.zeros(shape) for shape in MODULES[type(a.attention)].cache_shapes(a.attention, 1, T))
    rope, positions = jnp.asarray(rope_table(T, a.attention.rope_dim, a.rope)), jnp.arange(T)[None]
    x, moe = decoder.embedding[...][tokens][None], iter(experts)
    for layer in decoder.layers:
        x = x + layer.attention.cached(layer.attention_norm(x), positions, rope, kv)[0]
        h = layer.expert_norm(x)[0]
        if layer.feed_forward is not None:
            x = x + layer.feed_forward(h)
            continue
        ids, gates = layer.router.choose(layer.router.logits(h))
        outputs = jax.vmap(lambda w, h=h: run_expert(h, w, a.experts.activation))(next(moe))  # [E, T, D]
        mixed = jnp.einsum("tk,tkd->td", gates, outputs[ids, jnp.arange(T)[:, None]])
        x = x + mixed + (0 if layer.shared is None else layer.shared(h))
    return linear(decoder.norm(x[0]), decoder.head_weight())


def by_id(ids: np.ndarray, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same choices [..., K], ordered by expert id: ties in rank are not ours to break as torch does."""
    order = np.argsort(ids, axis=-1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(gates, order, -1)


def same_model(case: Case) -> None:
    """Prefill and decode equal `transformers`: logits, router choices, gates, greedy tokens."""
    s = subject(case)
    a = s.architecture
    full = s.theirs(s.prompts[0])[0]
    np.testing.assert_allclose(s.reference, full, rtol=0, atol=SAME * np.abs(full).max(), err_msg="all of the prompt")

    assert s.converted.architecture == a
    stages, bank = Stages(a, jnp.float32), HostBank(s.converted)
    source = OffloadedExperts(bank, a, max(a.top_k, bank_share(a)) * bank.expert_bytes)
    dense = device_weights(s.converted.dense(), jnp.float32)
    predictor = predictors.load("router", min(2, a.num_moe_layers), "", a, dense)
    engine = Engine(stages, dense, source, predictor, prefill_chunk=32)
    prefilled: list[list[Any]] = [[] for _ in range(a.num_moe_layers)]
    engine.record = Record()
    logits, state = engine.prefill(s.prompts, NEW_TOKENS, lambda layer, _c, routed: prefilled[layer].append(routed))
    B, steps = logits.shape[0], [np.asarray(logits)]
    for _ in range(NEW_TOKENS):
        steps.append(np.asarray(engine.decode(steps[-1].argmax(-1).astype(np.int32), state)))
    source.close()
    assert bounds.replay(engine, engine.record, lambda layer, e: bank.copy((layer, e)), steps=1) > 0
    joined = lambda field: np.stack(
        [
            np.concatenate([np.asarray(getattr(r, field)).reshape(B, -1, a.top_k) for r in rs], axis=1)
            for rs in prefilled
        ]
    )
    prompt_ids, prompt_gates = by_id(joined("ids"), joined("gates"))  # [L, B, T, K]
    decoded = np.sort(np.stack(engine.record.ids).reshape(NEW_TOKENS, a.num_moe_layers, B, a.top_k), axis=-1)

    for row, prompt in enumerate(s.prompts):
        ours = np.stack([step[row] for step in steps])  # [1 + NEW_TOKENS, V]
        tokens = ours.argmax(-1)
        theirs, ids, gates = s.theirs(prompt + tokens[:-1].tolist())
        scale, n = np.abs(theirs).max(), len(prompt)
        np.testing.assert_allclose(ours, theirs[n - 1 :], rtol=0, atol=SAME * scale, err_msg=f"logits of row {row}")
        np.testing.assert_array_equal(prompt_ids[:, row, :n], ids[:, :n], err_msg=f"router choices of row {row}")
        np.testing.assert_allclose(prompt_gates[:, row, :n], gates[:, :n], rtol=0, atol=SAME * gates.max())
        np.testing.assert_array_equal(decoded[:, :, row], ids[:, n:].swapaxes(0, 1), err_msg=f"decode of row {row}")
        best = np.sort(theirs[n - 1 :], axis=-1)
        certain = best[:, -1] - best[:, -2] > 2 * SAME * scale
        assert certain.mean() > 0.9, "hardly any greedy token can be compared"
        np.testing.assert_array_equal(tokens[certain], theirs[n - 1 :].argmax(-1)[certain], err_msg="greedy tokens")


def feature_counts(case: Case, feature: str) -> None:
    """Without the feature the logits are others; were it not so, the parity test would prove nothing about it."""
    s = subject(case)
    mutant = case.without[feature](s.architecture)
    assert mutant != s.architecture, f"{feature} is not on in this case"
    moved = np.abs(s.dense_forward(mutant) - s.reference).max() / np.abs(s.reference).max()
    assert moved > MOVED, f"without {feature} the logits move by {moved:.1e} of their scale"


def features(cases: list[Case]) -> list[Any]:
    """(case, feature) for every feature that a case can do without."""
    return [pytest.param(case, feature, id=f"{case}-{feature}") for case in cases for feature in case.without]


def bank_share(a: Architecture) -> int:
    """A third of all experts."""
    return a.num_moe_layers * a.num_experts // 3


def _restricted(tree: Any, like: Any) -> Any:
    """The part of a pure dict that `like` has too."""
    return {key: _restricted(tree[key], like[key]) for key in like} if isinstance(like, dict) else tree

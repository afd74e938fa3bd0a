"""How far a look-ahead's logits can be trusted: its sharpness by layer and horizon, fitted on text, kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint.bank_file import write_durably
from moe_jax.checkpoint.hf import reading
from moe_jax.errors import UserError
from moe_jax.model.platforms import reproducible
from moe_jax.outputs import room
from moe_jax.prediction.activation_log import ActivationLog, Activations
from moe_jax.prediction.interface import Features, Spec, multi_hot
from moe_jax.prediction.lookahead import DefaultVector, Router, default_sharpness, look
from moe_jax.prediction.membership import membership

LOOKAHEADS: dict[str, Router | DefaultVector] = {p.name: p for p in (Router(), DefaultVector())}
FILE = "calibration.json"  # in a predictor's folder
STRIDE = 8  # every eighth token of a window: neighbours say nearly the same
BATCH = 8  # windows that are read together
GRID = np.geomspace(0.03, 30, 31)  # a quarter apart: the loss is flat around its least value


def fit(name: str, params: Any, spec: Spec, log: ActivationLog, windows: np.ndarray) -> np.ndarray:
    """Of a grid the sharpness of least cross-entropy, float32 [L + 1, H]; the default where nothing is known.

    Args:
      name, params: one of LOOKAHEADS; its `sharpness` does not matter.
      windows: of the log, text that nothing was trained on.
    """
    total: Any = 0.0
    for start in range(0, len(windows), BATCH):
        part = log.read(windows[start : start + BATCH])
        missing = BATCH - len(part.lengths)  # padding rows have length 0: nothing of them counts
        padded = Activations(*(np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in part))
        total = total + np.asarray(_losses(name, spec, params, padded), np.float64)
    known = total.any(1)  # [L + 1, H]
    return np.where(known, GRID[total.argmin(1)], default_sharpness(spec)).astype(np.float32)


@reproducible(static_argnums=(0, 1))
def _losses(name: str, spec: Spec, params: Any, a: Activations) -> jax.Array:
    """Sums of the cross-entropy of membership, float32 [L + 1, G, H], for every sharpness of the grid."""
    L, E, H = spec.num_layers, spec.num_experts, spec.horizon
    W, _, T = a.ids.shape[:3]
    tokens = jnp.arange(1, T, STRIDE)
    rows = lambda x: x[:, tokens].reshape(-1, *x.shape[2:])  # [W, T, ...] to [N, ...]

    def hidden(layer):
        own = lambda x: rows(jax.lax.dynamic_index_in_dim(x, layer, 1, keepdims=False)).astype(jnp.float32)
        ids = own(a.ids).astype(jnp.int32)
        return LOOKAHEADS[name].hidden(params, Features(layer, own(a.residual), own(a.logits), ids, own(a.gates)))

    steps = jnp.moveaxis(a.ids, 2, 1).reshape(W, T * L, -1)  # the target of a place is that many steps further
    lengths = jnp.repeat(jnp.asarray(a.lengths), len(tokens))
    token, row = jnp.tile(tokens, W), jnp.repeat(jnp.arange(W), len(tokens))

    def at(place):
        seen = jax.lax.cond(
            place == 0, lambda: rows(a.embedding).astype(jnp.float32), lambda: hidden(jnp.maximum(place - 1, 0))
        )
        _, values = look(params, seen, place - 1)
        target = (token * L + place - 1)[:, None] + jnp.arange(1, H + 1)  # [N, H]
        known = (target // L < lengths[:, None])[..., None]
        wanted = multi_hot(steps[row[:, None], jnp.minimum(target, T * L - 1)].astype(jnp.int32), E)

        def loss(sharpness):
            p = jnp.clip(membership(sharpness * values, spec.top_k), 1e-6, 1 - 1e-6)
            entropy = -jnp.where(wanted > 0, jnp.log(p), jnp.log1p(-p))
            return (entropy * known).sum((0, 2))

        return jax.lax.map(loss, jnp.asarray(GRID, jnp.float32))

    return jax.lax.map(at, jnp.arange(L + 1))


def store(directory: str | Path, model: str, sharpness: Mapping[str, np.ndarray], texts: Sequence[str]) -> None:
    """Keeps what `fit` gave, by name of the look-ahead, beside a trained predictor of the same model.

    Args:
      model: fingerprint.
      texts: what it was fitted on, for people.

    Raises:
      UserError: the disk is full; what was stored before stays.
    """
    values = {name: np.round(value.astype(float), 3).tolist() for name, value in sharpness.items()}
    document = {"model": model, "texts": list(texts), "sharpness": values}
    file = Path(directory) / FILE
    with room(file, resumes=True):
        write_durably(file, json.dumps(document).encode() + b"\n")


def stored(directory: str | Path, spec: Spec, model: str) -> dict[str, np.ndarray]:
    """What `store` kept, cut to the horizon of `spec`; empty if there is nothing, or not so far ahead.

    Raises:
      UserError: it is of another model, damaged, or cannot be read.
    """
    file = Path(directory) / FILE
    with reading(file):
        if not str(directory) or not file.exists():
            return {}
        data = file.read_bytes()
    try:
        document = json.loads(data)
        found = {name: np.array(value, np.float32) for name, value in document["sharpness"].items()}
        if document["model"] != model:
            raise UserError(f"{file} is of another model; choose another --config.prefetch.checkpoint")
        if any(value.ndim != 2 or len(value) != spec.num_layers + 1 for value in found.values()):
            raise ValueError("wrong sizes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); train the predictor again") from None
    return {name: value[:, : spec.horizon] for name, value in found.items() if value.shape[1] >= spec.horizon}

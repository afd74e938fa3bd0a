"""A trained predictor on disk: weights with orbax, and what they are for as JSON beside them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.checkpoint.bank_file import write_durably
from moe_jax.errors import UserError
from moe_jax.outputs import room
from moe_jax.prediction import calibration, recall_file, usage
from moe_jax.prediction.interface import Spec

SCHEMA = 6
TABLE = "tokens"  # of the network, float [rows, ...]: nearly all its bytes
CARD = "predictor.json"


def save(directory: str | Path, weights: dict[str, Any], spec: Spec, model: str, notes: dict[str, Any]) -> None:
    """Writes what was trained, replacing earlier ones: weights as float16, tables of tokens as int8 with a step per
    column. Recall does not change by more than 0.1%.

    Args:
      directory: created.
      weights: `network` of `Learned`, `vectors` of `DefaultVector` and `best` of `BestPerLayer`.
      spec, model: what it was trained for; model is the fingerprint.
      notes: anything worth keeping, for people (JSON).

    Raises:
      UserError: the disk is full; then there is no predictor. Or a weight is not finite; then an earlier one stays.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        small = jax.tree.map(_half, weights | {"network": _pack(weights["network"])})
    for path, value in jax.tree_util.tree_leaves_with_path(small):
        if not np.isfinite(value).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"the predictor's weights {name} are not finite, so it is not saved;"
                " lower --config.fit.learning_rate and choose another --config.output"
            )
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    # The card first, so that a folder that was half written is no predictor; what was measured is of earlier weights.
    for name in (CARD, calibration.FILE, recall_file.FILE, usage.FILE):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "weights", ignore_errors=True)
    card = {"schema": SCHEMA, "model": model, "spec": dataclasses.asdict(spec), "notes": notes}
    with room(directory, resumes=True):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / "weights", small)
        write_durably(directory / CARD, json.dumps(card, indent=1).encode() + b"\n")


def load(directory: str | Path, spec: Spec, model: str) -> Any:
    """The weights of `save` in float32, cut to `spec.horizon`; and `sharpness` of `calibration.stored`, if any.

    Raises:
      UserError: there is no predictor, it cannot be read, it was trained for another model, or its horizon is shorter
        than asked for.
    """
    directory = Path(directory).absolute()
    try:
        card = json.loads((directory / CARD).read_text())
        if card["schema"] != SCHEMA:
            raise UserError(f"predictor {directory} has another format; train it again with train_predictor.py")
        trained, trained_for = Spec.from_dict(card["spec"]), card["model"]
    except FileNotFoundError:
        raise UserError(f"{directory} holds no trained predictor; make one with train_predictor.py") from None
    except NotADirectoryError:
        raise UserError(f"{directory} is no folder; name the one that holds {CARD}") from None
    except OSError as error:
        raise UserError(f"{directory / CARD} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / 'predictor.json'} is damaged ({error}); train it again") from None
    if trained_for != model:
        raise UserError(
            f"predictor {directory} was trained for another model; train one for this model with train_predictor.py,"
            " or choose --config.prefetch.predictor=router"
        )
    if trained.horizon < spec.horizon:
        raise UserError(
            f"predictor {directory} looks {trained.horizon} layers ahead, not {spec.horizon};"
            f" set --config.prefetch.horizon={trained.horizon} or train a longer one"
        )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            weights = checkpointer.restore(directory / "weights")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights of predictor {directory} cannot be read ({reason}); train it again") from None
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32), weights)
    best = weights["best"][:, : spec.horizon]
    weights |= {"network": _cut(_unpack(weights["network"]), spec), "best": best}
    sharpness = calibration.stored(directory, spec, model)
    return weights | {"sharpness": sharpness} if sharpness else weights


def _half(x: Any) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype == np.int8:
        return x
    return x.astype(np.int32 if x.dtype.kind == "i" else np.float16)


def _pack(network: dict[str, Any]) -> dict[str, Any]:
    table = np.asarray(network[TABLE], np.float32)
    step = (np.abs(table).max(0) / 127).astype(np.float16)  # as it will be read
    packed = np.round(table / np.maximum(step.astype(np.float32), 1e-6)).clip(-127, 127).astype(np.int8)
    return {name: x for name, x in network.items() if name != TABLE} | {f"{TABLE}_int8": packed, f"{TABLE}_step": step}


def _unpack(network: dict[str, Any]) -> dict[str, Any]:
    table = network.pop(f"{TABLE}_int8") * network.pop(f"{TABLE}_step")
    return network | {TABLE: table}


def _cut(network: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """The network for a shorter horizon: estimates of all layers remain."""
    return network | {name: network[name][:, : spec.horizon] for name in ("scale", "shift")}

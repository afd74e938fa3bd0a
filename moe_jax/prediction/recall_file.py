"""How well each layer is predicted, by exact decode steps over validation text: JSON beside a trained predictor.

`hybrid` execution decides by it which layers run what is predicted. `evaluate.py --measure_recall` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.checkpoint.bank_file import write_durably
from moe_jax.errors import UserError
from moe_jax.outputs import room

FILE = "recall.json"  # in a predictor's folder
FIX = "measure it with evaluate.py --measure_recall --config.prefetch.checkpoint"
Recall = list[float | None]
"""By layer: recall@K of what is predicted for it one layer before (for layer 0: before the token enters); None where
nothing is."""


def store(directory: str | Path, model: str, recall: dict[str, Recall], texts: Sequence[str]) -> None:
    """Keeps the recall of some predictors. Other predictors' stays, if it is of the same model.

    Args:
      model: fingerprint of the model it was measured on.
      recall: by predictor.
      texts: names of the validation texts, for people.

    Raises:
      UserError: the disk is full; what was stored before stays.
    """
    file = Path(directory) / FILE
    try:
        found = _read(file)
    except UserError:  # damaged: it is written anew
        found = None
    others = found["recall"] if found and found["model"] == model else {}
    document = {"model": model, "texts": list(texts), "recall": others | recall}
    with room(file):
        write_durably(file, json.dumps(document, indent=1).encode() + b"\n")


def stored(directory: str | Path, model: str, predictor: str) -> Recall | None:
    """What `store` kept for this predictor, or None.

    Raises:
      UserError: it was measured on another model, or is damaged.
    """
    file = Path(directory) / FILE
    if not str(directory) or (found := _read(file)) is None:
        return None
    if found["model"] != model:
        raise UserError(f"{file} was measured on another model; {FIX}={directory}")
    return found["recall"].get(predictor)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
        number = lambda r: r is None or (isinstance(r, int | float) and 0 <= r <= 1)
        if all(number(r) for recall in found["recall"].values() for r in recall):
            return {"model": found.get("model"), "recall": dict(found["recall"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{file} is damaged; delete it and {FIX}={file.parent}")

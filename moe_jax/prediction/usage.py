"""How often each expert is going to be used after the next token: a small network, fitted to logged routing.

A cache gives up what is needed last. Predictors of the coming layers say nothing of it: what they name is kept anyway,
and nearly all that is in memory is needed by later tokens or not at all. Recent use tells (a text keeps to its
subject), and that of other experts tells more: those that a subject needs are used together. So the network reads
how often all experts were used of late, over several spans, and says how often each will be. It is asked once a
token, on the host, and does not see the text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from moe_jax.checkpoint.bank_file import write_durably
from moe_jax.checkpoint.hf import reading
from moe_jax.errors import UserError
from moe_jax.outputs import room
from moe_jax.prediction.interface import Spec

FILE = "usage.safetensors"  # in a predictor's folder


class Usage(NamedTuple):
    """The network, of N = L * E experts and S averages of each. `usage_fit.py` fits it."""

    bias: Any  # float32 [N]
    own: Any  # [S, N]: of an expert's own averages
    enter: Any  # [S * N, hidden]
    enter_bias: Any  # [hidden]
    leave: Any  # [hidden, N]

    def __call__(self, averages: np.ndarray) -> np.ndarray:
        """Chance of use by each token after the next one, float32 [L, E], nearer ones counting more.

        `averages`: of earlier use, float32 [S, L, E], as `offload.history.History` has them.
        """
        logits = self.logits(averages.reshape(1, -1), np)
        return (0.5 + 0.5 * np.tanh(0.5 * logits)).reshape(averages.shape[1:])

    def logits(self, x: Any, xp: Any) -> Any:
        """Of averages x [rows, S * N], float32 [rows, N]; `xp`: numpy, or jax's."""
        own = (x.reshape(len(x), *self.own.shape) * self.own).sum(1)
        return self.bias + own + xp.tanh(x @ self.enter + self.enter_bias) @ self.leave


def store(directory: str | Path, model: str, usage: Usage) -> None:
    """Keeps the network, as float16, beside a trained predictor of the same model.

    Args:
      model: fingerprint.

    Raises:
      UserError: the disk is full; what was stored before stays.
    """
    file = Path(directory) / FILE
    tensors = {name: np.asarray(x, np.float16) for name, x in usage._asdict().items()}
    with room(file, resumes=True):
        write_durably(file, safetensors.numpy.save(tensors, {"about": json.dumps({"model": model, "reads": _reads()})}))


def there(directory: str | Path) -> bool:
    """Whether a predictor's folder has a network. Raises UserError where nobody may look."""
    file = Path(directory) / FILE
    with reading(file):
        return bool(str(directory)) and file.exists()


def stored(directory: str | Path, spec: Spec, model: str) -> Usage:
    """What `store` kept, float32.

    Raises:
      UserError: it is of another model, or damaged.
    """
    file = Path(directory) / FILE
    fix = "train the predictor again, or delete it"
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            about = json.loads((opened.metadata() or {}).get("about", "{}"))
            if about.get("model") != model:
                raise UserError(f"{file} is of another model; choose another --config.prefetch.checkpoint")
            if about.get("reads") != _reads():
                raise UserError(f"{file} is of another version; {fix}")
            usage = Usage(*(opened.get_tensor(name).astype(np.float32) for name in Usage._fields))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} is damaged ({error}); {fix}") from None
    (scales, count), hidden = np.shape(usage.own), np.shape(usage.leave)[0]
    wanted = ((count,), (scales, count), (scales * count, hidden), (hidden,), (hidden, count))
    if count != spec.num_layers * spec.num_experts or tuple(map(np.shape, usage)) != wanted:
        raise UserError(f"{file} is damaged (wrong sizes); {fix}")
    if not all(np.isfinite(x).all() for x in usage):
        raise UserError(f"{file} is damaged (a weight is no number); {fix}")
    return usage


def _reads() -> str:
    """What the network was fitted to read and to say, which the cache that asks it must mean too."""
    # Here, so that the all-resident reference never imports offload.
    from moe_jax.offload.history import FADING, SCALES, YOUNG

    return f"averages over {','.join(map(str, SCALES))} tokens and {YOUNG}; says use fading by {FADING}"

"""Mixture-of-Experts inference in JAX for models whose experts do not fit in device memory.

import moe_jax

model = moe_jax.load()
for piece in model.generate("In the beginning", max_new_tokens=50):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_jax.inference.session import Model


def load(checkpoint: str = "", **overrides: Any) -> Model:
    """Loads a model: `load()` is the shipped one, a quarter of its experts on the device, with the learned predictor.

    Args:
      checkpoint: a Hugging Face directory, or empty for the shipped model.
      **overrides: fields of `moe_jax.config.Config`, e.g. `dtype="bfloat16"`, `offload={"device_budget": "50%"}`.

    Raises:
      UserError: a field, the checkpoint or the budget is wrong; the text names the fix.
    """
    from moe_jax.config import Config
    from moe_jax.inference.session import Model

    return Model(Config.from_dict({"checkpoint": checkpoint, **overrides}))

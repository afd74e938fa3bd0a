"""Makes `lm_eval --model moe_jax` work (see `harness.py`), as lm-eval itself will once it reads entry points.

Its main branch finds models of other packages by the entry point `lm_eval.models`, which pyproject.toml declares;
releases up to 0.4.13 and 0.5.0.dev1 do not. So `lm_eval.pth`, which is installed beside the package, has Python import
this module where the program that starts is lm-eval's. Every other one pays for a comparison of names.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from types import TracebackType

from moe_jax import cli
from moe_jax.errors import UserError


def register() -> None:
    """Tells lm-eval of the models that installed packages declare."""
    try:
        from lm_eval.api.registry import model_registry
    except ImportError:  # said by the program that starts
        return
    for point in entry_points(group="lm_eval.models"):
        if point.name not in model_registry:
            model_registry.register(point.name, target=point)
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A mistake of the user ends in one line, without a traceback."""
    if issubclass(kind, UserError):
        cli.fail(str(error))
    sys.__excepthook__(kind, error, traceback)


register()

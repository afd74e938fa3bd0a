"""`python -m moe_jax.evaluation.lm_eval` is `lm_eval`, which also knows `--model moe_jax` (see `harness.py`).

lm-eval's main branch finds models of other packages by the entry point `lm_eval.models`, which pyproject.toml declares;
releases up to 0.4.13 and 0.5.0.dev1 do not. (A script `lm_eval` of our own does not help: pip installs packages of an
extra in any order, and the last one wins.)
"""

from __future__ import annotations

from moe_jax import cli
from moe_jax.errors import UserError


def main() -> None:
    """The command line of lm-eval."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        cli.fail(f"{error.name} is not installed: pip install 'moe_jax[eval]'")
    if "moe_jax" not in model_registry:
        model_registry.register("moe_jax", target="moe_jax.evaluation.harness:MoeJax")  # imported when it is asked for
    try:
        cli_evaluate()
    except UserError as error:
        cli.fail(str(error))


if __name__ == "__main__":
    main()

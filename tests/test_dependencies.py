"""What the tests compare with is not needed to run: a plain install does not bring it, and nothing imports it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
name = lambda requirement: re.split(r"[^\w-]", requirement)[0]
PEERS = {name(requirement) for requirement in PROJECT["optional-dependencies"]["peers"]}
IMPORTED = """
import importlib, pkgutil, sys
for peer in sys.argv[1:]:
    sys.modules[peer] = None  # importing it raises ImportError
import moe_jax
for module in pkgutil.walk_packages(moe_jax.__path__, "moe_jax."):
    importlib.import_module(module.name)
"""


def test_a_plain_install_brings_no_peer():
    assert {"torch", "transformers", "accelerate", "sentencepiece"} <= PEERS
    assert not PEERS & {name(requirement) for requirement in PROJECT["dependencies"]}


def test_every_module_imports_without_them():
    optional = {name(r) for group in ("peers", "plot") for r in PROJECT["optional-dependencies"][group]}
    command = [sys.executable, "-c", IMPORTED, *sorted(optional)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

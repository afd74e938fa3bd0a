"""The compilers for accelerators that are not here: what pyproject.toml's dependency group `aot` names.

    python tests/aot/compilers.py        installs them (0.4 GB to download, 1.1 GB on the disk)

They lie in a folder of their own, `aot` in the environment's: installed beside jax, each of its starts without
JAX_PLATFORMS=cpu would complain of missing devices and libraries on stderr. No NVIDIA package, driver or device is
needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "aot"


def pins() -> dict[str, str]:
    """Version by package name, of the group."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["aot"]
    return dict(requirement.split("==") for requirement in group)


def missing() -> str:
    """Why nothing can be compiled; empty: it can."""
    wanted = pins()
    if (jax := version("jax")) != wanted["jax-cuda13-plugin"]:
        return (
            f"the dependency group aot is for jax {wanted['jax-cuda13-plugin']}, not {jax}: pin its packages to match"
        )
    installed = {d.metadata["Name"]: d.version for d in distributions(path=[str(FOLDER)])}
    if any(installed.get(name) != pin for name, pin in wanted.items()):
        return "the dependency group aot is not installed: python tests/aot/compilers.py"
    return ""


def environment() -> dict[str, str]:
    """Of a process that compiles: the CPU is its only backend."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), str(FOLDER)])
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def install() -> None:
    """Without what these packages depend on: jax is there, and what else they name is for devices."""
    packages = [f"{name}=={pin}" for name, pin in pins().items()]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(FOLDER)]
    subprocess.run([*command, *packages], check=True)


if __name__ == "__main__" and missing():
    install()
    sys.exit(missing() or None)

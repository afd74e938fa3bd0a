"""What training measures at every step, for curves: as JSON lines, and for TensorBoard where tensorboardX is there."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Writer(Protocol):
    """Takes what was measured."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps the values of a step. A run that was killed measures some steps again: the last value counts."""
        ...

    def close(self) -> None:
        """Everything is on disk afterwards."""
        ...


class JsonLines:
    """One JSON object a line: {"step": 7, "loss": 0.3}."""

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file.open("a", buffering=1)  # a line is there when its step is done

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files for `tensorboard --logdir=DIRECTORY`; needs `pip install moe_jax[tensorboard]`."""

    def __init__(self, directory: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def writers(directory: Path) -> list[Writer]:
    """Those that can write here, into DIRECTORY/scalars.jsonl and DIRECTORY."""
    found: list[Writer] = [JsonLines(directory / "scalars.jsonl")]
    return found + [TensorBoard(directory)] if importlib.util.find_spec("tensorboardX") else found

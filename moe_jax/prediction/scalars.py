"""What training measures at every step, for curves: as JSON lines, and for TensorBoard where tensorboardX is there."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moe_jax.outputs import room


class Writer(Protocol):
    """Takes what was measured. Its methods raise UserError where the disk is full."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps the values of a step. A run that was killed measures some steps again: the last value counts."""
        ...

    def close(self) -> None:
        """Everything is on disk afterwards."""
        ...


class JsonLines:
    """One JSON object a line: {"step": 7, "loss": 0.3}."""

    def __init__(self, file: Path):
        self._path = file
        with room(file, resumes=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a", buffering=1)  # a line is there when its step is done
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)  # a full disk may have taken half a line

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with room(self._path, resumes=True):
            self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        with room(self._path, resumes=True):
            self._file.close()


class TensorBoard:
    """An event file for `tensorboard --logdir=DIRECTORY`; needs `pip install moe_jax[tensorboard]`.

    Not by tensorboardX's SummaryWriter: where the disk is full its thread dies, and the next step waits for it forever.
    """

    def __init__(self, directory: Path):
        from tensorboardX.record_writer import RecordWriter

        self._path = directory / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        with room(self._path, resumes=True):
            self._records = RecordWriter(str(self._path))
        self._put(file_version="brain.Event:2")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._put(step=step, summary=scalar(name, value))

    def close(self) -> None:
        with room(self._path, resumes=True):
            self._records.close()

    def _put(self, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        with room(self._path, resumes=True):
            self._records.write(Event(wall_time=time.time(), **event).SerializeToString())


def writers(directory: Path) -> list[Writer]:
    """Those that can write here, into DIRECTORY/scalars.jsonl and DIRECTORY."""
    found: list[Writer] = [JsonLines(directory / "scalars.jsonl")]
    return found + [TensorBoard(directory)] if importlib.util.find_spec("tensorboardX") else found

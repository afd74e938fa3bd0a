"""Curves: what is written can be read again."""

import json
from typing import Any

import pytest

from moe_jax.prediction import scalars


def write(directory):
    for writer in scalars.writers(directory):
        writer.write(1, {"loss": 0.5})
        writer.write(2, {"loss": 0.25, "validation_recall": 0.75})
        writer.close()


def test_json_lines_go_on_where_a_run_stopped(tmp_path):
    write(tmp_path / "new")
    write(tmp_path / "new")
    lines = [json.loads(line) for line in (tmp_path / "new" / "scalars.jsonl").read_text().splitlines()]
    assert lines == 2 * [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "validation_recall": 0.75}]


def test_a_line_is_there_when_its_step_is_done(tmp_path):
    writers = scalars.writers(tmp_path)
    for writer in writers:
        writer.write(7, {"loss": 0.5})
    found = (tmp_path / "scalars.jsonl").read_text()  # a killed run closes nothing
    for writer in writers:
        writer.close()
    assert json.loads(found) == {"step": 7, "loss": 0.5}


def test_tensorboard_reads_the_events(tmp_path):
    events: Any = pytest.importorskip("tensorboardX.proto.event_pb2")
    write(tmp_path)
    (file,) = tmp_path.glob("events*")
    data, seen = file.read_bytes(), []
    while data:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = events.Event.FromString(data[12 : 12 + length])
        seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert seen == [(1, "loss", 0.5), (2, "loss", 0.25), (2, "validation_recall", 0.75)]

"""Curves: what is written can be read again."""

import contextlib
import json
from typing import Any

import pytest

from moe_jax.errors import UserError
from moe_jax.prediction import scalars
from tests.full_disk import files_of_at_most


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


@pytest.mark.parametrize("kind", ["JsonLines", "TensorBoard"])
def test_a_disk_that_fills_ends_in_one_line_and_lines_stay_whole(tmp_path, kind):
    place = {"JsonLines": tmp_path / "scalars.jsonl", "TensorBoard": tmp_path}[kind]
    writer = getattr(scalars, kind)(place)
    message = rf"^{place}.* cannot be written \(File too large\).* goes on where this one"
    with files_of_at_most(110):
        with pytest.raises(UserError, match=message):
            for step in range(1000):
                writer.write(step, {"loss": 0.5})
        with pytest.raises(UserError, match=message):
            writer.close()
    file = next(tmp_path.iterdir())
    assert file.stat().st_size == 110  # not the end of a line
    if kind == "JsonLines":
        with contextlib.closing(scalars.JsonLines(place)) as resumed:
            resumed.write(3, {"loss": 0.25})
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines == [*({"step": step, "loss": 0.5} for step in range(4)), {"step": 3, "loss": 0.25}]

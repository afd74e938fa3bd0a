"""The trace's numbers, worked out by hand."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.errors import UserError
from moe_jax.trace import FEW, Load, Trace


def example():
    trace = Trace(keep_predictions=True)
    trace.peak_bytes = 70
    trace.begin_token(-1)
    trace.step(0, [0, 1, 2], ["missed", "missed", "missed"])
    trace.stall(8.0)
    for expert in range(3):
        trace.load(Load(0, expert, "demand", 10, -1, 0.0, 1.0, True))
    trace.begin_token(0)
    trace.step(0, [0, 1], ["cached", "cached"])
    trace.predict(np.full((2, 4), 0.5, np.float32))
    trace.step(1, [2, 3], ["prefetched", "late"])
    trace.stall(0.5)
    trace.stall(0.25)
    trace.begin_token(1)
    trace.step(0, [1, 3], ["cached", "missed"])
    trace.stall(0.25)
    trace.step(1, [2, 0], ["cached", "late"])
    for load in (
        Load(1, 2, "speculative", 10, 0, 2.0, 3.0, True),
        Load(1, 3, "speculative", 10, 0, 3.0, 4.0, True),
        Load(0, 3, "demand", 10, 1, 5.0, 6.0, True),
        Load(1, 1, "speculative", 10, 1, 6.0, 7.0, False),
        Load(1, 0, "speculative", 10, 1, 7.0, None, False),  # still in flight at exit
    ):
        trace.load(load)
    return trace


def test_summary_of_decoding():
    assert example().summary() == {
        "tokens": 2,
        "needed": {"cached": 4 / 8, "prefetched": 1 / 8, "late": 2 / 8, "missed": 1 / 8},
        "hit_rate": 5 / 8,
        "ready_recall": 1 / 4,
        "loads": 5,
        "bytes_per_token": {"demand": 5.0, "speculative_used": 10.0, "speculative_wasted": 10.0},
        "stall_s_per_token": 0.5,
        "peak_device_cache_bytes": 70,
    }


def test_summary_with_the_prefill():
    summary = example().summary(decode_only=False)
    assert summary["tokens"] == 3
    assert summary["needed"]["missed"] == 4 / 11
    assert summary["bytes_per_token"]["demand"] == 40 / 3
    assert summary["stall_s_per_token"] == 3.0


def test_figures_that_do_not_apply_are_none():
    summary = Trace().summary()
    assert summary["hit_rate"] is summary["ready_recall"] is summary["stall_s_per_token"] is None
    assert set(summary["needed"].values()) == set(summary["bytes_per_token"].values()) == {None}
    trace = Trace()
    trace.begin_token(0)
    trace.step(0, [1], ["cached"])
    assert trace.summary()["ready_recall"] is None and trace.summary()["hit_rate"] == 1.0


@given(
    loads=st.lists(
        st.tuples(
            st.sampled_from(["demand", "speculative"]),
            st.integers(0, 9),
            st.booleans(),
            st.integers(1, 30),
            st.booleans(),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_without_details_the_summary_is_the_same_and_little_is_kept(loads):
    """Loads that stay for some time, are used or not before they go, and of which new ones may count bytes later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_jax.trace.FEW", 2)
        traces = Trace(), Trace(details=False)
    for trace in traces:
        held: list[tuple[int, Load, bool]] = []
        for at, (cause, size, decoded, stay, used) in enumerate(loads):
            trace.begin_token(at if decoded else -1)
            trace.step(0, [at], ["missed" if cause == "demand" else "prefetched"])
            trace.stall(0.25 * size)
            trace.predict(np.zeros((1, 2), np.float32))
            trace.load(load := Load(0, at, cause, 0, at if decoded else -1, 0.0))
            held.append((at + stay, load, used))
            load.bytes += size
            for until, old, needed in held:
                old.used |= needed and until == at + 1
                old.gone = until <= at
    with_details, without = traces
    assert without.summary() == with_details.summary()
    assert without.summary(decode_only=False) == with_details.summary(decode_only=False)
    assert not without.steps() and len(with_details.steps()) == len(loads) == len(with_details.loads)
    assert len(without.loads) <= 2 * 30 + 256


def test_what_is_gone_is_forgotten_without_details():
    trace = Trace(details=False)
    for _ in range(20 * FEW):
        trace.load(Load(0, 0, "demand", 1, 0, 0.0, gone=True))
        assert len(trace.loads) <= FEW
    assert trace.summary()["loads"] == 20 * FEW


def test_steps_are_enough_to_replay():
    steps = example().steps()
    assert [(step.token, step.layer, step.needed) for step in steps if step.token >= 0] == [
        (0, 0, (0, 1)), (0, 1, (2, 3)), (1, 0, (1, 3)), (1, 1, (2, 0)),
    ]  # fmt: skip
    assert steps[1].predicted is not None and steps[2].predicted is None
    assert [step.stall_s for step in steps] == [8.0, 0.0, 0.75, 0.25, 0.0]


def test_predictions_are_dropped_by_default():
    trace = Trace()
    trace.step(0, [1], ["cached"])
    trace.predict(np.zeros((1, 2), np.float32))
    assert trace.steps()[0].predicted is None


def test_a_saved_trace_reads_back(tmp_path):
    trace = example()
    trace.save(tmp_path / "trace.jsonl")
    back = Trace.read(tmp_path / "trace.jsonl")
    assert back.summary() == trace.summary() and back.loads == trace.loads
    np.testing.assert_array_equal(back.steps()[1].predicted, trace.steps()[1].predicted)
    assert back.summary(decode_only=False) == trace.summary(decode_only=False)
    lines = [json.loads(line)["kind"] for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert lines == ["trace"] + 5 * ["step"] + 8 * ["load"]


HEADER = '{"kind": "trace", "schema": 1, "peak_bytes": 0, "decode_tokens": 0}\n'


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", "no json", '{"kind": "trace", "schema": 99}\n', '{"kind": "step"}\n', "[1, 2]\n", "3\n"),
        *('{"kind": "trace", "schema": 1}\n', HEADER + "[]\n", HEADER + '{"kind": "load", "x": 1}\n'),
        *(HEADER + '{"kind": "step", "token": 0}\n', HEADER + "{}\n"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, text):
    path = tmp_path / "trace.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="trace.jsonl"):
        Trace.read(path)

"""The report says what the trace holds."""

from moe_jax.analysis.report import markdown
from moe_jax.trace import Load, Trace


def test_a_row_per_layer_and_the_totals():
    trace = Trace()
    for token in (-1, 0, 1):
        trace.begin_token(token)
        trace.step(0, [3, 1], ["cached", "missed" if token else "prefetched"])
        trace.step(1, [2], ["late"])
        trace.stall(0.002)
    trace.loads += [Load(0, 1, "demand", 4000, 1, 0.0, 0.1, True), Load(1, 2, "speculative", 2000, 0, 0.0, 0.1, False)]
    trace.loads.append(Load(1, 2, "speculative", 9000, -1, 0.0, 0.1, True))  # of the prefill: left out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(trace).splitlines()[4:]]
    assert rows[2] == ["0", "50.0%", "25.0%", "0.0%", "25.0%", "0.000", "2.0", "0.0", "0.0"]
    assert rows[3] == ["1", "0.0%", "0.0%", "100.0%", "0.0%", "2.000", "0.0", "0.0", "1.0"]
    assert rows[4] == ["all", "33.3%", "16.7%", "33.3%", "16.7%", "2.000", "2.0", "0.0", "1.0"]


def test_nothing_recorded():
    assert "No decode step" in markdown(Trace())

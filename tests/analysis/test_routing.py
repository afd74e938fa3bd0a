"""Routing statistics of made-up choices whose numbers are known, from a log and from Parquet."""

import numpy as np
import pytest

from moe_jax.analysis import routing
from moe_jax.errors import UserError
from tests.prediction.synthetic import written_log


def test_known_numbers():
    t = np.arange(64)
    steady = np.stack([np.zeros(64, int), np.ones(64, int)], -1)  # always experts 0 and 1
    turning = np.stack([t % 4, (t + 2) % 4], -1)  # even; never what the token before used
    found = routing.summarise([np.stack([steady, turning, turning])], 4)
    np.testing.assert_allclose(found["entropy"], [1, 2, 2])
    np.testing.assert_allclose(found["token_locality"], [1, 0, 0])
    np.testing.assert_allclose(found["load_least"], [0, 1, 1])
    np.testing.assert_allclose(found["coactivation"], [1, 2, 2])  # 0 with 2, half of the time and not a quarter
    assert found["layer_locality"][0] == pytest.approx(0) and found["layer_locality"][1] == pytest.approx(2)
    assert found["layer_locality"][2] is None


def test_a_log_counts_only_real_tokens(tmp_path):
    log = written_log(tmp_path, count=5, length=9, lengths=np.array([9, 2, 9, 5, 1]))
    windows, experts = routing.read_log(tmp_path)
    windows = list(windows)
    assert experts == 6 and [w.shape[1] for w in windows] == [9, 2, 9, 5, 1]
    np.testing.assert_array_equal(windows[3], log.read([3]).ids[0, :, :5])


def test_what_is_no_log_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is not an activation log"):
        routing.read_log(tmp_path)


def test_parquet_in_any_order(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    ids = np.random.default_rng(0).integers(0, 4, (2, 3, 5, 2))  # sequences, layers, tokens, K
    rows = [(s, t, layer, ids[s, layer, t].tolist()) for s in range(2) for layer in range(3) for t in range(5)]
    rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    names = ("sequence", "position", "layer", "experts")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    parquet.write_table(pyarrow.table(columns), tmp_path / "trace.parquet")
    np.testing.assert_array_equal(routing.read_parquet(tmp_path / "trace.parquet"), ids)
    parquet.write_table(pyarrow.table({k: v[1:] for k, v in columns.items()}), tmp_path / "short.parquet")
    with pytest.raises(UserError, match="every layer of every token once"):
        routing.read_parquet(tmp_path / "short.parquet")

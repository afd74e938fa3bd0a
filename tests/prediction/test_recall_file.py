"""Recall beside a trained predictor: of one model, of one training, and read by `hybrid` only."""

import json

import numpy as np
import pytest

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.inference.session import Model, shipped
from moe_jax.prediction import recall_file, saved
from tests.full_disk import files_of_at_most
from tests.prediction.synthetic import MODEL, SPEC
from tests.tiny import write_tiny


def test_it_is_kept_by_predictor(tmp_path):
    assert recall_file.stored(tmp_path, MODEL, "router") is None and recall_file.stored("", MODEL, "router") is None
    recall_file.store(tmp_path, MODEL, {"router": [None, 0.5]}, ["text"])
    recall_file.store(tmp_path, MODEL, {"repeat": [None, 0.1]}, ["text"])
    assert recall_file.stored(tmp_path, MODEL, "router") == [None, 0.5]
    assert recall_file.stored(tmp_path, MODEL, "repeat") == [None, 0.1]
    assert recall_file.stored(tmp_path, MODEL, "learned") is None


def test_that_of_another_model_is_refused_and_replaced(tmp_path):
    recall_file.store(tmp_path, "another model", {"router": [None, 0.5], "repeat": [None, 0.1]}, ["text"])
    with pytest.raises(
        UserError, match=f"on another model; measure it with .*--measure_recall .*checkpoint={tmp_path}"
    ):
        recall_file.stored(tmp_path, MODEL, "router")
    recall_file.store(tmp_path, MODEL, {"router": [None, 0.6]}, ["text"])
    assert recall_file.stored(tmp_path, MODEL, "router") == [None, 0.6]
    assert recall_file.stored(tmp_path, MODEL, "repeat") is None  # that was of the other one


def test_one_without_a_model_is_of_another(tmp_path):
    (tmp_path / recall_file.FILE).write_text(json.dumps({"recall": {"router": [None, 0.5]}}))
    with pytest.raises(UserError, match="on another model"):
        recall_file.stored(tmp_path, MODEL, "router")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"recall": {"router": 3}}', '{"recall": {"router": ["a"]}}', '{"recall": {"router": [NaN]}}'],
)
def test_a_damaged_one_is_one_line_and_written_anew(tmp_path, text):
    (tmp_path / recall_file.FILE).write_text(text)
    with pytest.raises(UserError, match="is damaged; delete it and measure it") as error:
        recall_file.stored(tmp_path, MODEL, "router")
    assert "\n" not in str(error.value)
    recall_file.store(tmp_path, MODEL, {"router": [0.5]}, ["text"])
    assert recall_file.stored(tmp_path, MODEL, "router") == [0.5]


def test_a_full_disk_is_one_line_and_keeps_what_was_stored(tmp_path):
    recall_file.store(tmp_path, MODEL, {"router": [None, 0.5]}, ["text"])
    with files_of_at_most(20), pytest.raises(UserError, match=r"recall.json cannot be written \(File too large\)"):
        recall_file.store(tmp_path, MODEL, {"repeat": [None, 0.1]}, ["text"])
    assert recall_file.stored(tmp_path, MODEL, "router") == [None, 0.5]


def test_a_new_training_drops_what_was_measured_of_the_old_one(tmp_path):
    recall_file.store(tmp_path, MODEL, {"learned": [None, 0.5]}, ["text"])
    saved.save(tmp_path, {"network": {"tokens": np.zeros((2, 3))}, "vectors": np.zeros(2)}, SPEC, MODEL, {})
    assert recall_file.stored(tmp_path, MODEL, "learned") is None


def test_only_hybrid_reads_it(tmp_path):
    checkpoint = write_tiny(tmp_path / "model")
    (tmp_path / "predictor").mkdir()
    recall_file.store(tmp_path / "predictor", "another model", {"router": [0.5] * 5}, ["text"])
    prefetch = {"predictor": "router", "checkpoint": str(tmp_path / "predictor"), "horizon": 2}
    model = Model(Config.from_dict({"checkpoint": str(checkpoint), "prefetch": prefetch, "offload": {"tier": "none"}}))
    predictor = model.predictor("router", model.engine.dense)
    assert model.execution("speculative", predictor, None, model.engine.dense)
    with pytest.raises(UserError, match="measured on another model"):
        model.execution("hybrid", predictor, None, model.engine.dense)
    model.close()


def test_what_ships_is_of_the_shipped_model():
    card = json.loads((shipped("predictor") / saved.CARD).read_text())
    for name in ("learned", "best_per_layer", "router", "default_vector"):
        recall = recall_file.stored(shipped("predictor"), card["model"], name)
        assert recall is not None and len(recall) == card["spec"]["num_layers"]

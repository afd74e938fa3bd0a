"""Default vectors against an independent NumPy computation of their equations, from calibration to prediction."""

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.inference import activations
from moe_jax.prediction import predictors
from moe_jax.prediction.activation_log import ActivationLog
from moe_jax.prediction.interface import Features, ModelParts, Spec
from moe_jax.prediction.lookahead import default_vectors
from moe_jax.prediction.texts import Windows
from tests import reference
from tests.inference.test_engine import make_engine
from tests.tiny import TINY, write_tiny

LENGTHS = [24, 7, 24, 16, 24, 24, 1, 24, 24, 20, 24]  # more windows than run together, some of them short


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Engine, weights as the reference reads them, the plan, and the vectors that a log of it gives."""
    directory = write_tiny(tmp_path_factory.mktemp("model"))
    engine = make_engine(directory, prefill_chunk=8 * 16)  # chunks of 16 tokens: windows take two
    tokens = np.random.default_rng(0).integers(3, TINY.vocab_size, (len(LENGTHS), 24)).astype(np.int32)
    tokens[np.arange(24) >= np.array(LENGTHS)[:, None]] = 0
    plan = Windows(tokens, np.array(LENGTHS, np.int32), np.arange(len(LENGTHS), dtype=np.int32), ["a"] * len(LENGTHS))
    spec = Spec.of(TINY, 4)
    log = ActivationLog(tmp_path_factory.mktemp("log"), spec, "tiny", plan)
    activations.write_log(engine, log)
    return engine, reference.read(directory), plan, log, spec


def reference_vectors(w, plan):
    """d[l, e]: the mean output of expert e over the tokens whose top K has it; and what was seen of every window."""
    sums = np.zeros((TINY.num_layers, TINY.num_experts, TINY.d_model))
    counts, windows = np.zeros(sums.shape[:2]), []
    for row, length in zip(plan.tokens, plan.lengths, strict=True):
        seen = []
        reference.forward(TINY, w, row[:length].tolist(), seen=seen)
        for layer, (_, gates, outputs) in enumerate(seen):
            for t, e in zip(*np.nonzero(gates), strict=True):
                sums[layer, e] += outputs[t, e]
                counts[layer, e] += 1
        windows.append(seen)
    return sums / counts[..., None], counts, windows


def test_calibration_and_prediction_equal_numpy(calibrated):
    engine, w, plan, log, spec = calibrated
    expected, counts, windows = reference_vectors(w, plan)
    assert counts.min() > 0
    found = log.outputs()
    np.testing.assert_array_equal(found.counts, counts)
    vectors, unseen = default_vectors(*found)
    assert unseen == 0
    np.testing.assert_allclose(vectors, expected, rtol=1e-3, atol=1e-4)

    parts = ModelParts.of(engine.dense)
    params = predictors.params_of("default_vector", spec, parts, {"vectors": vectors})
    apply = jax.jit(predictors.DefaultVector().apply)
    for layer, (residual, gates, _) in enumerate(windows[0]):
        ids = np.argsort(-gates, -1, kind="stable")[:, : TINY.top_k].astype(np.int32)
        chosen = np.take_along_axis(gates, ids, -1).astype(np.float32)
        features = Features(np.int32(layer), residual.astype(np.float32), np.zeros((24, 7), np.float32), ids, chosen)
        prediction, _ = apply(params, (), features)
        q = residual + gates @ expected[layer]
        for h in range(1, spec.horizon + 1):
            target = (layer + h) % TINY.num_layers
            p = f"model.layers.{target}."
            norm = w[p + "post_attention_layernorm.weight"] * q / np.sqrt((q * q).mean(-1, keepdims=True) + 1e-5)
            logits = norm @ w[p + "block_sparse_moe.gate.weight"].T
            np.testing.assert_allclose(prediction.logits[:, h - 1], logits, rtol=1e-3, atol=1e-3)
            # Ranked as the router would rank them.
            best = np.argsort(-logits, -1)[:, : TINY.top_k]
            same = np.sort(np.argsort(-np.asarray(prediction.probability[:, h - 1]), -1)[:, : TINY.top_k])
            assert (same == np.sort(best)).mean() > 0.99


def test_an_expert_never_seen_gets_the_layers_mean():
    sums = np.array([[[2.0, 4.0], [0.0, 0.0], [9.0, 3.0]]])
    vectors, unseen = default_vectors(sums, np.array([[2, 0, 3]]))
    assert unseen == 1
    np.testing.assert_allclose(vectors, [[[1, 2], [11 / 5, 7 / 5], [3, 1]]])


def test_the_log_holds_what_the_reference_sees(calibrated):
    _, _, plan, log, _ = calibrated
    _, _, windows = reference_vectors(calibrated[1], plan)
    logged = log.read(range(len(plan.lengths)))
    for row, (length, seen) in enumerate(zip(plan.lengths, windows, strict=True)):
        for layer, (residual, gates, _) in enumerate(seen):
            np.testing.assert_allclose(logged.residual[row, layer, :length], residual, rtol=2e-3, atol=1e-2)
            chosen = np.take_along_axis(gates, logged.ids[row, layer, :length].astype(int), -1)
            np.testing.assert_allclose(logged.gates[row, layer, :length], chosen, atol=2e-3)


@pytest.mark.parametrize("what", ["residual", "logits", "outputs"])
def test_what_is_not_finite_is_not_logged(calibrated, tmp_path, monkeypatch, what):
    engine, _, plan, _, spec = calibrated
    prefill = engine.prefill

    def broken(prompts, first, sink):
        worse = lambda layer, routed: routed._replace(**{what: getattr(routed, what) * (np.nan if layer == 2 else 1)})
        return prefill(prompts, first, lambda layer, chunk, routed: sink(layer, chunk, worse(layer, routed)))

    monkeypatch.setattr(engine, "prefill", broken)
    log = ActivationLog(tmp_path, spec, "tiny", plan)
    with pytest.raises(
        UserError, match="MoE layer 2 are not finite: the checkpoint is damaged, or this --config.dtype"
    ):
        activations.write_log(engine, log)
    assert log.missing() == [0]

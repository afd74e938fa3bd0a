"""Every predictor: probabilities, memory, the wrap into the next token, one executable for all layers."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.checkpoint.families import mixtral
from moe_jax.errors import UserError
from moe_jax.model.architecture import Routing
from moe_jax.model.router import choose
from moe_jax.prediction import calibration, predictors, saved
from moe_jax.prediction.interface import Features, ModelParts, Spec, fingerprint, last_ids, multi_hot
from tests.prediction.synthetic import SPEC, activations, parts

ALL = [*map(predictors.named, ("random", "frequency", "repeat", "router", "default_vector", "best_per_layer"))]
ALL += [predictors.Learned(2)]
named = pytest.mark.parametrize("predictor", ALL, ids=lambda p: p.name)


def run(predictor, arrays, spec=SPEC, params=None):
    """P [W, T, L, H, E] of `apply` over all tokens and layers, the state at the end, and the executables compiled."""
    residual, logits, ids = (jnp.asarray(x) for x in arrays)
    W, L, T = ids.shape[:3]
    params = predictor.init(jax.random.key(0), spec, parts(spec)) if params is None else params
    state, out, traced = predictor.init_state(spec, W), [], []

    @jax.jit
    def apply(params, state, features):
        traced.append(features.layer)  # runs when an executable is made
        return predictor.apply(params, state, features)

    for t in range(T):
        for layer in range(L):
            chosen = ids[:, layer, t].astype(jnp.int32)
            gates = jax.nn.softmax(jnp.take_along_axis(logits[:, layer, t], chosen, axis=-1))
            features = Features(np.int32(layer), residual[:, layer, t], logits[:, layer, t], chosen, gates)
            prediction, state = apply(params, state, features)
            out.append(np.asarray(prediction.probability))
    return np.stack(out, axis=1).reshape(W, T, L, *out[0].shape[1:]), state, len(traced)


@named
def test_probabilities_and_one_executable(predictor):
    p, _, executables = run(predictor, activations(SPEC, parts(), 2, 5))
    assert p.shape == (2, 5, SPEC.num_layers, SPEC.horizon, SPEC.num_experts) and p.dtype == np.float32
    assert (p >= 0).all() and (p <= 1).all() and np.isfinite(p).all()
    assert executables == 1
    if predictor.name != "learned":  # an untrained network is not calibrated
        np.testing.assert_allclose(p.sum(-1).mean(), SPEC.top_k, rtol=0.15)


@named
def test_priming_equals_running_the_prompt(predictor):
    arrays = activations(SPEC, parts(), 3, 7)
    _, state, _ = run(predictor, arrays)
    ids = np.full((SPEC.num_layers, 3, 9, SPEC.top_k), -1)
    ids[:, :, :7] = arrays[2].swapaxes(0, 1)  # padded at the end, as a batch of prompts is
    primed = predictor.prime(SPEC, ids)
    assert jax.tree.structure(primed) == jax.tree.structure(state)
    if predictor.name == "learned":  # activations of a prompt are not kept: of them it knows nothing
        assert primed.shape == state.shape and not primed.any()
    elif predictor.name not in ("random", "best_per_layer"):  # a counter; only the memories of those that are asked
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), primed, state)


@named
def test_rows_are_independent(predictor):
    if predictor.name == "random":
        return
    arrays = activations(SPEC, parts(), 3, 4)
    together = run(predictor, arrays)[0]
    alone = run(predictor, [x[1:2] for x in arrays])[0]
    np.testing.assert_allclose(together[1:2], alone, atol=1e-6)


def test_router_is_the_target_layers_router_on_this_residual():
    arrays, model = activations(SPEC, parts(), 2, 3), parts()
    sharpness = np.linspace(0.5, 1.5, (SPEC.num_layers + 1) * SPEC.horizon).reshape(-1, SPEC.horizon)
    params = predictors.params_of("router", SPEC, model, {"sharpness": {"router": sharpness.astype(np.float32)}})
    p, _, _ = run(predictors.Router(), arrays, params=params)
    for layer in range(SPEC.num_layers):
        for h in range(1, SPEC.horizon + 1):
            target, x = (layer + h) % SPEC.num_layers, arrays[0][:, layer]
            normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + SPEC.norm_eps) * model.expert_norms[target]
            logits, ours = normed @ model.routers[target].T, p[:, :, layer, h - 1]
            own = sharpness[layer + 1, h - 1] / logits.std(-1, keepdims=True)
            odds = np.log(ours / (1 - ours))  # the router's logits, moved and stretched
            np.testing.assert_allclose(odds - odds[..., :1], own * (logits - logits[..., :1]), atol=1e-3)
            np.testing.assert_allclose(ours.sum(-1), SPEC.top_k, atol=1e-3)


def test_before_layer_0_the_router_looks_at_the_embedding():
    router, embedding = predictors.Router(), activations(SPEC, parts(), 2, 1)[0][:, 0, 0]
    params = router.init(jax.random.key(0), SPEC, parts())
    begun, state = router.begin(params, router.init_state(SPEC, 2), jnp.asarray(embedding), np.zeros(2, np.int32))
    normed = embedding / np.sqrt((embedding**2).mean(-1, keepdims=True) + SPEC.norm_eps)
    expected = np.einsum("bd,hed->bhe", normed, parts().routers * parts().expert_norms[:, None])  # layers 0, 1, 2
    np.testing.assert_allclose(begun.logits, expected, atol=1e-5)


ROUTINGS = [
    Routing(2, "softmax"),
    Routing(3, "softmax_chosen", bias=True),
    Routing(2, "sigmoid", renormalise=False, correction_bias=True, num_groups=3, groups_kept=2, group_score="top2"),
    Routing(2, "softmax", renormalise=False, num_groups=2, groups_kept=1, scale=16.0),
]


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.scoring)
def test_the_router_ranks_as_the_model_chooses(routing):
    """Biases, corrections and groups of the target layers count: at horizon L the target is the layer itself."""
    rng = np.random.default_rng(0)
    spec = dataclasses.replace(SPEC, routing=routing)
    bias, correction = rng.normal(size=(2, SPEC.num_layers, SPEC.num_experts)).astype(np.float32)
    model = parts()._replace(
        router_biases=bias if routing.bias else None, corrections=correction if routing.correction_bias else None
    )
    router, residual = predictors.Router(), rng.normal(size=(40, SPEC.d_model)).astype(np.float32)
    nothing = Features(np.int32(1), jnp.asarray(residual), *[jnp.zeros((40, 1))] * 3)
    prediction, _ = router.apply(router.init(jax.random.key(0), spec, model), (), nothing)
    normed = residual / np.sqrt((residual**2).mean(-1, keepdims=True) + SPEC.norm_eps) * model.expert_norms[1]
    logits = normed @ model.routers[1].T + (bias[1] if routing.bias else 0)
    np.testing.assert_allclose(prediction.logits[:, -1], logits, atol=1e-5)
    ids, _ = choose(jnp.asarray(logits), routing, jnp.asarray(correction[1]) if routing.correction_bias else None)
    ranked = jax.lax.top_k(prediction.probability[:, -1], routing.top_k)[1]
    np.testing.assert_array_equal(ranked, ids)


def test_repeat_names_the_last_tokens_experts_and_after_the_wrap_this_tokens():
    ids = activations(SPEC, parts(), 2, 6)[2]
    p, _, _ = run(predictors.Repeat(), activations(SPEC, parts(), 2, 6))
    for t in range(1, 6):
        for layer in range(SPEC.num_layers):
            for h in range(1, SPEC.horizon + 1):
                wraps = layer + h >= SPEC.num_layers
                expected = ids[:, (layer + h) % SPEC.num_layers, t if wraps else t - 1]
                ranked = np.argsort(-p[:, t, layer, h - 1], axis=-1)[:, : SPEC.top_k]
                np.testing.assert_array_equal(np.sort(ranked), np.sort(expected))
    # Of a text that has not begun it knows nothing.
    np.testing.assert_allclose(p[:, 0, 0, 0], SPEC.prior)


def test_repeat_counts_how_often_it_holds():
    fixed = np.zeros((1, SPEC.num_layers, 20, SPEC.top_k), int) + [1, 4]
    residual, logits, _ = activations(SPEC, parts(), 1, 20)
    p, _, _ = run(predictors.Repeat(), (residual, logits, fixed))
    assert p[0, -1, 0, 0, 1] > 0.9 and p[0, -1, 0, 0, 0] < 0.05


def test_frequency_counts():
    arrays = activations(SPEC, parts(), 2, 6)
    p, _, _ = run(predictors.Frequency(), arrays)
    counts = np.array(multi_hot(jnp.asarray(arrays[2]), SPEC.num_experts)).cumsum(axis=2)  # [W, L, T, E]
    expected = (counts[:, 2, 3] + SPEC.prior) / (4 + 1)
    np.testing.assert_allclose(p[:, 4, 0, 1], expected, rtol=1e-5)  # token 4, layer 0: layer 2 has seen tokens 0 to 3
    np.testing.assert_allclose(p[:, 3, 2, 2], expected, rtol=1e-5)  # layer 2 of token 3, all the way round: 3 too


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_last_ids_skips_padding(lengths):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 6, (3, len(lengths), 4, 2))
    ids[:, np.arange(4) >= np.array(lengths)[:, None]] = -1
    last = last_ids(ids)
    for row, length in enumerate(lengths):
        expected = ids[:, row, length - 1] if length else np.full((3, 2), -1)
        np.testing.assert_array_equal(last[row], expected)


ARCHITECTURE = mixtral.architecture(
    vocab_size=8,
    d_model=SPEC.d_model,
    num_layers=SPEC.num_layers,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    num_experts=SPEC.num_experts,
    top_k=SPEC.top_k,
    expert_ff=4,
    max_seq_len=16,
)


def dense(model: ModelParts):
    pairs = zip(*model[:2], strict=True)
    return {"layers": {i: {"router": {"weight": r}, "expert_norm": {"weight": n}} for i, (r, n) in enumerate(pairs)}}


def test_the_fingerprint_ignores_the_dtype_and_the_experts_only():
    same = fingerprint(ARCHITECTURE, dense(parts()))
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), dense(parts()))
    wider = dataclasses.replace(ARCHITECTURE, experts=dataclasses.replace(ARCHITECTURE.experts, ff=64))
    assert same == fingerprint(ARCHITECTURE, half) == fingerprint(wider, dense(parts()))
    assert same != fingerprint(ARCHITECTURE, dense(parts(seed=1)))
    assert same != fingerprint(dataclasses.replace(ARCHITECTURE, routing=Routing(top_k=1)), dense(parts()))
    assert same != fingerprint(dataclasses.replace(ARCHITECTURE, tie_embeddings=True), dense(parts()))
    more = dense(parts()) | {"embedding": np.ones((8, SPEC.d_model), np.float32)}
    other = dense(parts()) | {"embedding": np.full((8, SPEC.d_model), 2, np.float32)}
    assert len({same, fingerprint(ARCHITECTURE, more), fingerprint(ARCHITECTURE, other)}) == 3


def test_load_finds_every_predictor(tmp_path):
    spec = Spec.of(ARCHITECTURE, 3)
    network = predictors.Learned().init(jax.random.key(0), spec, parts())["network"]
    vectors = np.zeros((spec.num_layers, spec.num_experts, spec.d_model))
    weights = {"network": network, "vectors": vectors, "best": np.full((spec.num_layers + 1, 3), 3)}
    saved.save(tmp_path, weights, spec, fingerprint(ARCHITECTURE, dense(parts())), {})
    assert predictors.load("none", 2, "", ARCHITECTURE, dense(parts())) is None
    for predictor in ALL:
        found = predictors.load(predictor.name, 2, tmp_path, ARCHITECTURE, dense(parts()))
        assert found is not None
        assert found[0].name == predictor.name and found[1].horizon == 2
        features = Features(
            np.int32(1), jnp.ones((1, 12)), jnp.ones((1, 6)), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2))
        )
        prediction, _ = jax.eval_shape(found[0].apply, found[2], found[0].init_state(found[1], 1), features)
        assert prediction.probability.shape == prediction.logits.shape == (1, 2, SPEC.num_experts)


@pytest.mark.parametrize(
    ("name", "horizon", "message"),
    [
        ("lerned", 2, "unknown predictor"),
        ("router", 4, "choose --config.prefetch.horizon from 1 to 3"),
        ("router", 0, "choose --config.prefetch.horizon from 1 to 3"),
        ("learned", 2, "holds no trained predictor"),
        ("default_vector", 2, "holds no trained predictor"),
        ("oracle", 2, "replays a recorded run"),
    ],
)
def test_load_names_the_mistake(tmp_path, name, horizon, message):
    with pytest.raises(UserError, match=message) as error:
        predictors.load(name, horizon, tmp_path, ARCHITECTURE, dense(parts()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, file", [("learned", saved.CARD), ("router", calibration.FILE)])
def test_what_may_not_be_read_is_named(tmp_path, unreadable, name, file):
    (tmp_path / file).write_text("{}")
    unreadable(file)
    with pytest.raises(UserError, match=f"^{tmp_path / file} cannot be read: Permission denied$"):
        predictors.load(name, 2, tmp_path, ARCHITECTURE, dense(parts()))


def test_a_file_in_place_of_its_folder_is_said_to_be_one(tmp_path):
    (tmp_path / saved.CARD).write_text("{}")
    with pytest.raises(UserError, match="predictor.json is no folder; name the one that holds predictor.json"):
        predictors.load("learned", 2, tmp_path / saved.CARD, ARCHITECTURE, dense(parts()))


@pytest.mark.parametrize("name", predictors.TRAINED)
def test_a_trained_one_without_a_checkpoint_says_how_to_get_one(name):
    with pytest.raises(UserError, match="train_predictor.py"):
        predictors.load(name, 2, "", ARCHITECTURE, dense(parts()))

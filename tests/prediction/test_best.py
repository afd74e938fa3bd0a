"""best_per_layer: chosen by validation, and at every place and horizon it says what the chosen one says."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.prediction.best import CANDIDATES, BestPerLayer, choose
from moe_jax.prediction.interface import Features
from moe_jax.prediction.predictors import params_of
from tests.prediction.synthetic import SPEC, activations, logged, parts
from tests.prediction.test_learned import noisy, weights

L, H = SPEC.num_layers, SPEC.horizon


def test_every_place_and_horizon_gets_the_best():
    rng = np.random.default_rng(0)
    recall = {name: rng.random((L, H)) for name in CANDIDATES}
    first = {name: None if CANDIDATES[name].begin is None else rng.random(H) for name in CANDIDATES}
    best, names = choose(recall, first), list(CANDIDATES)
    assert best.shape == (L + 1, H)
    for layer, h in np.ndindex(L, H):
        assert recall[names[best[layer + 1, h]]][layer, h] == max(recall[name][layer, h] for name in names)
    for h in range(H):
        own = first[names[best[0, h]]]
        assert own is not None and own[h] == max(x[h] for x in first.values() if x is not None)


def test_it_says_what_the_chosen_one_says_and_asks_nobody_else():
    a, trained = logged(activations(SPEC, parts(), 2, 3)), weights(noisy(CANDIDATES["learned"]))
    numbers = {name: number for number, name in enumerate(CANDIDATES)}
    asked = ["router", "repeat", "learned"]
    best = np.random.default_rng(1).choice([numbers[name] for name in asked], (L + 1, H))
    best[0] = [numbers["router"], numbers["learned"], numbers["router"]]  # repeat says nothing before layer 0
    trained["best"] = best
    predictor, params = BestPerLayer(), params_of("best_per_layer", SPEC, parts(), trained)
    assert set(params) == {*asked, "best"}
    own = {name: params_of(name, SPEC, parts(), trained) for name in asked}
    start, apply = jax.jit(predictor.begin), jax.jit(predictor.apply)
    applied = {name: jax.jit(CANDIDATES[name].apply) for name in asked}
    begun = {name: jax.jit(begin) for name in asked if (begin := CANDIDATES[name].begin) is not None}
    state, states = predictor.init_state(SPEC, 2), {name: CANDIDATES[name].init_state(SPEC, 2) for name in asked}

    def check(place, prediction, answers):
        for h in range(H):
            chosen = answers[list(CANDIDATES)[best[place, h]]]
            np.testing.assert_allclose(prediction.probability[:, h], chosen.probability[:, h], atol=1e-6)
            np.testing.assert_allclose(prediction.logits[:, h], chosen.logits[:, h], atol=1e-4)

    for t in range(3):
        (embedding, tokens), answers = (jnp.asarray(a.embedding[:, t]), a.tokens[:, t]), {}
        prediction, state = start(params, state, embedding, tokens)
        for name, begin in begun.items():
            answers[name], states[name] = begin(own[name], states[name], embedding, tokens)
        check(0, prediction, answers)
        for layer in range(L):
            features = Features(np.int32(layer), *[x[:, layer, t] for x in a[1:5]])
            prediction, state = apply(params, state, features)
            for name in asked:
                answers[name], states[name] = applied[name](own[name], states[name], features)
            check(layer + 1, prediction, answers)

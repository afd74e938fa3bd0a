"""What the learned predictor is fitted to has its largest values where the model's own rule chooses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.architecture import Routing
from moe_jax.model.router import choose
from moe_jax.prediction.ranked_log import ranked
from tests.prediction.synthetic import SPEC, parts, written_log

RULES = [
    Routing(2, scoring="sigmoid", correction_bias=True),
    Routing(2, num_groups=3, groups_kept=1),
    Routing(2, scoring="sigmoid", correction_bias=True, num_groups=3, groups_kept=2, group_score="top2"),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return written_log(tmp_path_factory.mktemp("log"), count=6, length=8)


@pytest.mark.parametrize("routing", RULES, ids=str)
def test_the_largest_are_those_that_the_rule_chooses(log, routing):
    spec = dataclasses.replace(SPEC, routing=routing)
    shape = (spec.num_layers, spec.num_experts)
    corrections = np.random.default_rng(0).normal(size=shape).astype(np.float32) if routing.correction_bias else None
    model = parts()._replace(corrections=corrections)
    view = ranked(log, spec, model)
    plain, found = log.read([4, 1]), view.read([4, 1])
    chosen = lambda layer: choose(
        jnp.asarray(plain.logits[:, layer].reshape(-1, spec.num_experts), jnp.float32),
        routing,
        None if corrections is None else jnp.asarray(corrections[layer]),
    )[0]
    for layer in range(spec.num_layers):
        largest = jax.lax.top_k(found.logits[:, layer].reshape(-1, spec.num_experts), routing.top_k)[1]
        np.testing.assert_array_equal(np.sort(largest), np.sort(chosen(layer)))
    assert np.isfinite(found.logits).all() and (found.ids == plain.ids).all()
    largest = [np.sort(np.argsort(x.logits.astype(np.float32))[..., -2:]) for x in (plain, found)]
    assert (largest[0] != largest[1]).any()  # which are not those of the largest logits
    assert ranked(view, spec, model) is view and view.identity() == log.identity()


def test_a_plain_rule_needs_no_other_log(log):
    assert ranked(log, SPEC, parts()) is log

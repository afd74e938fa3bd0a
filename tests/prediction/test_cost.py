"""What the learned network costs next to the model it predicts for, counted from shapes."""

from typing import Any

import jax
import numpy as np
import pytest

from configs.predictor import get_config
from moe_jax.checkpoint.families import family
from moe_jax.model.layers import parameter_counts
from moe_jax.prediction.interface import ModelParts, Spec
from moe_jax.prediction.learned import Learned
from tests.families.test_real_sizes import MODELS

DEFAULTS: Any = get_config()
LEARNED = Learned(DEFAULTS.fit.hidden, DEFAULTS.fit.expert_hidden)


@pytest.mark.parametrize("name", MODELS)
def test_at_real_sizes_it_costs_at_most_3_percent_of_the_active_multiply_adds(name):
    a = family(MODELS[name].config).read_config(MODELS[name].config)
    spec = Spec.of(a, min(DEFAULTS.horizon, a.num_moe_layers))
    cost = (spec.num_layers + 1) * LEARNED.multiply_adds(spec) / parameter_counts(a)["active"]
    assert 0 < cost <= 0.03


def test_multiply_adds_are_those_of_the_tables():
    a = family(MODELS["Mixtral-8x7B"].config).read_config(MODELS["Mixtral-8x7B"].config)
    spec = Spec.of(a, 8)
    parts = ModelParts(np.zeros(0), np.zeros(0))
    network = jax.eval_shape(lambda key: LEARNED.init(key, spec, parts), jax.random.key(0))["network"]
    share = {"gates": spec.top_k / spec.num_experts, "previous": spec.top_k / spec.num_experts}
    share |= {"expert_in": share["gates"], "expert_out": share["gates"]}  # only those of the K chosen experts
    biases = {"expert_bias"}
    tables = {name: x for name, x in network.items() if len(x.shape) > 2 and name not in biases | {"scale", "shift"}}
    counted = sum(np.prod(x.shape[1:]) * share.get(name, 1) for name, x in tables.items())
    assert LEARNED.multiply_adds(spec) == counted

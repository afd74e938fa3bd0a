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
LEARNED = Learned(DEFAULTS.fit.expert_hidden)


@pytest.mark.parametrize("name", MODELS)
def test_at_real_sizes_it_costs_at_most_3_percent_of_the_active_multiply_adds(name):
    a = family(MODELS[name].config).read_config(MODELS[name].config)
    cost = LEARNED.multiply_adds(Spec.of(a, min(DEFAULTS.horizon, a.num_moe_layers))) / parameter_counts(a)["active"]
    assert 0 < cost <= 0.03


def test_multiply_adds_are_those_of_the_tables():
    a = family(MODELS["Mixtral-8x7B"].config).read_config(MODELS["Mixtral-8x7B"].config)
    spec = Spec.of(a, 8)
    parts = ModelParts(np.zeros(0), np.zeros(0))
    network = jax.eval_shape(lambda key: LEARNED.init(key, spec, parts), jax.random.key(0))["network"]
    # Only those of the K chosen experts; every estimate ahead is stretched by the scale of its horizon.
    share = dict.fromkeys(("gates", "expert_in", "expert_out"), spec.top_k / spec.num_experts)
    share["scale"] = spec.num_experts
    added = {"row", "tokens", "centre", "bias", "expert_bias", "shift"}
    counted = sum(np.prod(x.shape) * share.get(name, 1) for name, x in network.items() if name not in added)
    assert LEARNED.multiply_adds(spec) == counted

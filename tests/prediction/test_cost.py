"""What the learned network costs next to the model it predicts for, counted from shapes."""

from typing import Any

import jax
import numpy as np
import pytest

from configs.predictor import get_config
from moe_jax.checkpoint.families import family
from moe_jax.model.layers import parameter_counts
from moe_jax.prediction import regression_rows
from moe_jax.prediction.interface import ModelParts, Spec
from moe_jax.prediction.learned import Learned
from tests.families.test_real_sizes import MODELS

DEFAULTS: Any = get_config()
LEARNED = Learned(DEFAULTS.fit.expert_hidden, DEFAULTS.fit.tokens)


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
    of_chosen = spec.top_k / spec.num_experts
    share = {"gates": of_chosen, "expert_in": of_chosen, "expert_out": of_chosen, "scale": spec.num_experts}
    added = {"row", "correction", "tokens", "centre", "bias", "expert_bias", "shift"}
    counted = sum(np.prod(x.shape) * share.get(name, 1) for name, x in network.items() if name not in added)
    assert LEARNED.multiply_adds(spec) == counted


def test_the_closed_form_of_a_large_model_fits_into_2_gb():
    """The tables, every layer's basis, and of the windows held at once the estimates, one layer's inputs and system."""
    a = family(MODELS["Qwen3-30B-A3B"].config).read_config(MODELS["Qwen3-30B-A3B"].config)
    spec = Spec.of(a, 8)
    L, D, E, T = spec.num_layers, spec.d_model, spec.num_experts, DEFAULTS.window
    network = jax.eval_shape(
        lambda key: LEARNED.init(key, spec, ModelParts(np.zeros(0), np.zeros(0))), jax.random.key(0)
    )
    tables = sum(x.size for x in jax.tree.leaves(network["network"]))
    rows = T * regression_rows.windows_at_once(T, spec)
    system = 3 * 2 * (D + E + 1) ** 2  # float64: what is summed up, what is added, factors
    numbers = tables + L * D * D + 3 * rows * L * E + 4 * rows * (D + E + 1) + system
    assert 1e9 < 4 * numbers < 2e9

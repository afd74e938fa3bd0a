"""What the learned network costs next to the model it predicts for, counted from shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.predictor import get_config
from moe_jax.checkpoint.families import family
from moe_jax.model.layers import parameter_counts
from moe_jax.prediction import closed_form
from moe_jax.prediction.activation_log import Activations
from moe_jax.prediction.interface import ModelParts, Spec
from moe_jax.prediction.learned import Learned, corrected
from tests.families.test_real_sizes import MODELS

DEFAULTS: Any = get_config()
LEARNED = Learned(DEFAULTS.fit.rank, DEFAULTS.fit.begin_rank, DEFAULTS.fit.expert_hidden)


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
    chosen = {"gates", "expert_in", "expert_out"}
    share = dict.fromkeys(chosen, spec.top_k / spec.num_experts)  # only those of the K chosen experts
    added = {"bias", "begin_bias", "expert_bias", "scale", "shift"}
    counted = sum(np.prod(x.shape) * share.get(name, 1) for name, x in network.items() if name not in added)
    assert LEARNED.multiply_adds(spec) == counted


def test_the_closed_form_of_a_large_model_fits_into_2_gb():
    """Its system is one layer's, in float64, thrice: sums, what is added to them, factors. What remains of a layer is
    its basis and what its residual says."""
    a = family(MODELS["Qwen3-30B-A3B"].config).read_config(MODELS["Qwen3-30B-A3B"].config)
    spec, W, T, f = Spec.of(a, 8), 2, 4, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float16)
    L, D, E, K = spec.num_layers, spec.d_model, spec.num_experts, spec.top_k
    ids, lengths = jax.ShapeDtypeStruct((W, L, T, K), jnp.uint16), jax.ShapeDtypeStruct((W,), jnp.int32)
    log = Activations(f((W, T, D)), f((W, L, T, D)), f((W, L, T, E)), ids, f((W, L, T, K)), lengths)
    system = jax.eval_shape(lambda log: closed_form._moments(spec, False, 0, log), log)
    kept = (L + 1) * D * D + L * D * (len(corrected(L)) + 2) * E
    assert 0 < 3 * 8 * sum(x.size for x in system) + 4 * kept < 2e9

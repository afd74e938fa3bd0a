"""Experts called ahead of the host give the very bits of those that are called by name, in every form they may have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.architecture import ClampedSwiGLU, SwiGLU
from moe_jax.model.experts import ExpertWeights, run_chosen, run_held
from tests.model.test_quantized import int4, int8, mxfp4, packed

rng = np.random.default_rng(0)
E, K = 5, 3
ABSENT = -7.0


def plain(dtype):
    return lambda out, inputs: (jnp.asarray(rng.normal(size=(out, inputs)) / 8, dtype), None)


FORMS = {
    "float32": plain(jnp.float32),
    "bfloat16": plain(jnp.bfloat16),
    "int8": int8,
    "int4": int4,
    "packed": packed,
    "mxfp4": mxfp4,
}


def experts(form: str, width: int, hidden: int, biased: bool) -> tuple[ExpertWeights, ...]:
    bias = lambda n: jnp.asarray(rng.normal(size=n), jnp.bfloat16) if biased else None
    make = FORMS[form]
    return tuple(
        ExpertWeights(make(2 * hidden, width)[0], make(width, hidden)[0], bias(2 * hidden), bias(width))
        for _ in range(E)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width, hidden", [(64, 96), (320, 1088)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_held_runs_as_if_it_were_called_alone(form, biased, width, hidden, dtype):
    activation = ClampedSwiGLU(limit=7.0, alpha=1.7) if biased else SwiGLU()
    held, chosen = (jax.jit(functools.partial(run, activation)) for run in (run_held, run_chosen))
    weights = experts(form, width, hidden, biased)
    h = jnp.asarray(rng.normal(size=(1, width)), dtype)
    slots = jnp.full((K, width), ABSENT, dtype)
    for ids, there in (
        ([4, 0, 2], [0, 1, 2, 3, 4]),
        ([1, 3, 2], [-1, 1, -1, 3, -1]),
        ([3, 1, 0], [-1, 2, 3, -1, 4]),
        ([0, 1, 2], [3, 4, -1, -1, -1]),
    ):
        own = tuple(weights[max(expert, 0)] for expert in there)  # of one that is not there, any other's
        found, after = held(slots, h, jnp.asarray([ids], jnp.int32), np.array(there, np.int32), own)
        expected = slots
        for expert in sorted(set(ids) & set(there)):
            number = (jnp.int32(expert),)
            expected, _ = chosen(expected, h, jnp.asarray([ids], jnp.int32), number, (weights[expert],))
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
        assert [bool((row == ABSENT).all()) for row in np.asarray(found)] == [expert not in there for expert in ids]
        assert after == found[0, 0]

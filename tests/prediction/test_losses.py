"""Every term of a loss is least where it should be, and only there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.prediction import losses
from tests.prediction.synthetic import SPEC, activations, logged, parts

E, K = SPEC.num_experts, SPEC.top_k


@pytest.fixture(scope="module")
def wanted() -> losses.Wanted:
    return losses.wanted(SPEC, logged(activations(SPEC, parts(), 2, 5)))


def split(wanted, gap: float) -> jax.Array:
    """Margins that are `gap / 2` above 0 for the true top K and as much below for the others."""
    return gap * (wanted.members - 0.5)


def loss(name: str, wanted: losses.Wanted, logits: jax.Array, margins: Any = 0.0) -> float:
    values = losses.total(name, wanted, logits, jnp.broadcast_to(jnp.asarray(margins), logits.shape))
    assert values.shape == wanted.known.shape
    return float((values * wanted.known).sum() / wanted.known.sum())


def test_wanted_is_the_true_top_k(wanted):
    by_logits = np.sort(np.argsort(-np.asarray(wanted.logits), axis=-1)[..., :K], axis=-1)
    known = np.asarray(wanted.known)
    assert 0 < known.mean() < 1
    np.testing.assert_array_equal(np.sort(wanted.ids, axis=-1)[known], by_logits[known])
    np.testing.assert_array_equal(np.asarray(wanted.members).sum(-1)[known], K)


@pytest.mark.parametrize("name", ["squared", "kl"])
def test_terms_of_logits_are_least_for_those_of_the_router(wanted, name):
    noise = jax.random.normal(jax.random.key(0), wanted.logits.shape)
    assert loss(name, wanted, wanted.logits + 7) == pytest.approx(0, abs=1e-5)  # a constant says nothing
    near, far = (loss(name, wanted, wanted.logits + scale * noise) for scale in (0.1, 0.4))
    assert 1e-4 < near < far / 4
    gradient = jax.grad(lambda z: losses.total(name, wanted, z, z).sum())(wanted.logits)
    np.testing.assert_allclose(gradient, 0, atol=1e-4)


def test_squared_is_relative_to_the_variance(wanted):
    assert loss("squared", wanted, jnp.zeros_like(wanted.logits)) == pytest.approx(1, abs=1e-3)


def test_kl_against_numpy(wanted):
    rng = np.random.default_rng(0)
    found = rng.normal(size=wanted.logits.shape)
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    p, q = softmax(np.asarray(wanted.logits, np.float64)), softmax(found)
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(losses.kl(wanted, jnp.asarray(found), jnp.zeros(())), expected, rtol=1e-3, atol=1e-5)


def test_membership_is_least_for_the_true_probability(wanted):
    """Where nothing is known of the experts, that is the share of them that is chosen."""
    at = lambda p: loss("membership", wanted, wanted.logits, np.log(p / (1 - p)))
    assert at(K / E) < min(at(K / E - 0.05), at(K / E + 0.05))
    entropy = -(K / E * np.log(K / E) + (1 - K / E) * np.log(1 - K / E))
    assert at(K / E) == pytest.approx(entropy, rel=1e-4)
    assert loss("membership", wanted, wanted.logits, split(wanted, 30)) < 1e-5


def test_ranking_counts_the_pairs_that_are_the_wrong_way_round(wanted):
    assert loss("ranking", wanted, wanted.logits, split(wanted, 30)) < 1e-5
    assert loss("ranking", wanted, wanted.logits, 5.0) == pytest.approx(np.log(2), rel=1e-5)  # no order at all
    upside_down = loss("ranking", wanted, wanted.logits, split(wanted, -30))
    assert upside_down == pytest.approx(30, rel=1e-3)
    # One of the top K under one other: one pair of K (E - K).
    margins = np.asarray(split(wanted, 60)).copy()
    other = np.asarray(wanted.members).argmin(-1)
    ids = np.asarray(wanted.ids)
    np.put_along_axis(margins, other[..., None], 0.0, axis=-1)
    np.put_along_axis(margins, ids[..., :1], -30.0, axis=-1)
    pairs = K * (E - K)
    # 30 to the raised one; the rest of the others are level with the lowered one.
    expected = (30 + (E - K - 1) * np.log(2)) / pairs
    assert loss("ranking", wanted, wanted.logits, margins) == pytest.approx(expected, rel=1e-4)


def test_a_sum_is_the_sum_of_its_terms(wanted):
    z = jax.random.normal(jax.random.key(1), wanted.logits.shape)
    whole = losses.total("squared+kl+membership+ranking", wanted, z, z)
    np.testing.assert_allclose(whole, sum(term(wanted, z, z) for term in losses.TERMS.values()), rtol=1e-5)


@pytest.mark.parametrize(("loss", "said"), [("kl+hinge", "'hinge' is no term"), ("", "'' is no"), ("kl+kl", "twice")])
def test_what_is_no_loss_is_said(loss, said):
    with pytest.raises(UserError, match=said) as error:
        losses.check(loss)
    assert "twice" in said or "join some of squared, kl, membership, ranking" in str(error.value)

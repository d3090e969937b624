"""The divergence from a reference policy: estimators, their gradients and their mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import normalisers
from jentropy.base import Output
from jentropy.mechanisms.kl_reference import kl_reference

DIFFERENCE = np.array([[-3.0, -0.5, 0.0, 2.0]])
VALUES = {
    "k1": (DIFFERENCE, np.ones_like(DIFFERENCE)),
    "k2": (DIFFERENCE**2 / 2.0, DIFFERENCE),
    "k3": (np.exp(-DIFFERENCE) - 1.0 + DIFFERENCE, 1.0 - np.exp(-DIFFERENCE)),
    "k3+": (np.exp(-DIFFERENCE) - 1.0 + DIFFERENCE, DIFFERENCE),
}


def term_and_gradient(estimator, difference):
    log_prob = jnp.asarray(difference, jnp.float32) - 1.0
    batch = toy.rollouts(np.ones(log_prob.shape), token_data={"ref_log_prob": jnp.full_like(log_prob, -1.0)})
    ((_, term),) = kl_reference(estimator=estimator).terms.items()

    def total(x):
        value = term({"log_prob": x}, None, batch)
        return jnp.sum(value), value

    return jax.grad(total, has_aux=True)(log_prob)[::-1]


@pytest.mark.parametrize("estimator", VALUES)
def test_values_and_gradients(estimator):
    value, gradient = term_and_gradient(estimator, DIFFERENCE)
    np.testing.assert_allclose(value, VALUES[estimator][0], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, VALUES[estimator][1], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k3", "k3+"])
def test_a_token_far_below_the_reference_is_pulled_back(estimator):
    value, gradient = term_and_gradient(estimator, np.array([[-200.0, -15.0]]))
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradient)) and np.all(gradient < -10.0)


@pytest.mark.parametrize("estimator", VALUES)
def test_mean_over_response_tokens(estimator):
    batch, signals, advantage = toy.random_batch()
    mechanism = kl_reference(beta=0.5, estimator=estimator)
    plan = toy.update(mechanism, signals, advantage)
    ((name, coefficient),) = plan.terms.items()
    num_tokens = int(batch.loss_mask.sum())
    np.testing.assert_allclose(coefficient, np.where(batch.loss_mask, 0.5 / num_tokens, 0.0), rtol=1e-6)
    expected = mechanism.terms[name](signals.scores, plan, batch).sum()
    np.testing.assert_allclose(plan.metrics["actor/kl_loss"], (expected, num_tokens), rtol=1e-5)
    assert plan.metrics["actor/kl_coef"] == (0.5, 1.0)


def test_full_needs_an_output_and_no_reference_scores():
    batch, signals, advantage = toy.random_batch()
    mechanism = kl_reference(beta=1.0, estimator="full", normaliser=normalisers.token_sum)
    assert mechanism.outputs == (Output("reference_kl"),)
    divergence = jnp.where(batch.loss_mask, 0.5, jnp.nan)
    signals = toy.signals(batch.replace(token_data={}), log_prob=advantage, reference_kl=divergence)
    plan = toy.update(mechanism, signals, advantage)
    np.testing.assert_array_equal(plan.terms["reference_kl"], batch.loss_mask)
    num_tokens = int(batch.loss_mask.sum())
    assert plan.metrics["actor/kl_loss"] == (0.5 * num_tokens, num_tokens)


def test_zero_is_the_identity():
    _, signals, advantage = toy.random_batch()
    assert not np.any(toy.update(kl_reference(beta=0.0), signals, advantage).terms["kl_k3"])


def test_garbage_outside_the_mask_does_not_matter():
    clean, dirty = (toy.update(kl_reference(), *toy.random_batch(fill=fill)[1:]) for fill in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_missing_reference_scores_are_named():
    batch, signals, advantage = toy.random_batch()
    signals = signals.replace(batch=batch.replace(token_data={"value": batch.logp_old}))
    with pytest.raises(ValueError, match=r"kl_reference needs token_data\['ref_log_prob'\], got \['value'\]"):
        toy.update(kl_reference(), signals, advantage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, r"beta must be finite and at least 0, got -0\.1"),
        ({"estimator": "k4"}, r"estimator must be one of \['full', 'k1', 'k2', 'k3', 'k3\+'\], got 'k4'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        kl_reference(**options)

"""KL-Cov: the tokens of largest covariance, their penalty and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import compose, normalisers, ratios, surrogates
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.kl_cov import abs_log_ratio, kl_cov


def largest(batch, signals, advantage, k):
    mask = np.asarray(batch.loss_mask)
    log_prob, advantage = (np.asarray(x, np.float64) for x in (signals.scores["log_prob"], advantage))
    covariance = (log_prob - log_prob[mask].mean()) * (advantage - advantage[mask].mean())
    return mask & (covariance >= np.sort(covariance[mask])[-k])


@pytest.mark.parametrize(("ratio", "k"), [(0.25, None), (0.001, 1)])
def test_the_penalty_stands_on_the_largest_covariances(ratio, k):
    batch, signals, advantage = toy.random_batch()
    num_tokens = int(batch.loss_mask.sum())
    plan = toy.update(kl_cov(kl_cov_ratio=ratio, ppo_kl_coef=0.5), signals, advantage)
    selected = largest(batch, signals, advantage, k or int(ratio * num_tokens))
    np.testing.assert_allclose(plan.terms["abs_log_ratio"], selected * (0.5 / num_tokens), rtol=1e-6)
    assert plan.metrics["kl_cov/selected_fraction"] == (selected.sum(), num_tokens)


@pytest.mark.parametrize("keep_clip", [False, True])
def test_bounds(keep_clip):
    _, signals, advantage = toy.random_batch()
    chain = compose.chain(clip=clip_range(epsilon_low=0.25), kl=kl_cov(keep_clip=keep_clip))
    plan = toy.update(chain, signals, advantage)
    assert np.all(plan.ratio_low == (0.75 if keep_clip else 0.0))
    assert np.all(plan.ratio_high == (1.25 if keep_clip else np.inf))


def test_no_gradient_at_the_old_policy():
    batch, signals, advantage = toy.random_batch()
    signals = signals.replace(batch=batch.replace(logp_old=signals.scores["log_prob"]))
    mechanism = kl_cov(kl_cov_ratio=0.25)
    plan = toy.update(mechanism, signals, advantage)
    kwargs = {"surrogate": surrogates.ratio, "normaliser": normalisers.token_mean, "terms": mechanism.terms}
    _, gradient, _ = toy.loss_and_gradient(plan, signals, **kwargs)
    _, without, _ = toy.loss_and_gradient(plan.replace(terms={}), signals, **kwargs)
    assert np.any(plan.terms["abs_log_ratio"] > 0.0)
    np.testing.assert_array_equal(gradient, without)


def test_gradient_is_the_sign():
    batch = toy.rollouts(np.ones((1, 4), bool))
    x = jnp.array([[-0.5, -0.0, 0.0, 2.0]])
    gradient = jax.grad(lambda y: jnp.sum(abs_log_ratio({"log_prob": y}, None, batch)))(x)
    np.testing.assert_array_equal(gradient, [[-1.0, 0.0, 0.0, 1.0]])


def test_k3():
    batch, signals, advantage = toy.random_batch()
    mechanism = kl_cov(kl_cov_ratio=0.25, estimator="k3")
    plan = toy.update(mechanism, signals, advantage)
    value = mechanism.terms["k3_log_ratio"](signals.scores, plan, batch)
    expected = ratios.k3(signals.scores["log_prob"] - batch.logp_old)
    np.testing.assert_array_equal(value, np.where(batch.loss_mask, expected, 0.0))
    assert set(plan.terms) == {"k3_log_ratio"}


def test_equal_advantages_are_not_penalised():
    _, signals, advantage = toy.random_batch()
    plan = toy.update(kl_cov(kl_cov_ratio=0.25), signals, jnp.full_like(advantage, 0.1))
    assert not np.any(plan.terms["abs_log_ratio"])


@pytest.mark.parametrize("mechanism", [kl_cov(kl_cov_ratio=0.0), kl_cov(kl_cov_ratio=0.5, ppo_kl_coef=0.0)])
def test_neutral_settings(mechanism):
    _, signals, advantage = toy.random_batch()
    assert not np.any(toy.update(mechanism, signals, advantage).terms["abs_log_ratio"])


def test_empty_batch():
    batch, signals, advantage = toy.random_batch()
    empty = signals.replace(batch=batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask)))
    plan = toy.update(kl_cov(kl_cov_ratio=0.25), empty, advantage)
    assert not np.any(plan.terms["abs_log_ratio"])


def test_normaliser_of_the_policy_loss():
    batch, signals, advantage = toy.random_batch()
    options = {"kl_cov_ratio": 0.25, "ppo_kl_coef": 2.0}
    mechanism = kl_cov(normaliser=normalisers.sequence_mean_token_mean, **options)
    coefficient = toy.update(mechanism, signals, advantage).terms["abs_log_ratio"]
    weight = normalisers.sequence_mean_token_mean(batch.loss_mask, batch)
    np.testing.assert_allclose(coefficient, np.where(coefficient > 0.0, 2.0 * weight, 0.0), rtol=1e-6)
    explicit = toy.update(kl_cov(normaliser=normalisers.token_mean, **options), signals, advantage)
    default = toy.update(kl_cov(**options), signals, advantage)
    np.testing.assert_array_equal(explicit.terms["abs_log_ratio"], default.terms["abs_log_ratio"])


def test_garbage_outside_the_mask_does_not_matter():
    mechanism = kl_cov(kl_cov_ratio=0.25)
    clean, dirty = (toy.update(mechanism, *toy.random_batch(fill=fill)[1:]) for fill in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_cov_ratio": -0.1}, r"kl_cov_ratio must be in \[0, 1\], got -0\.1"),
        ({"ppo_kl_coef": -1.0}, r"ppo_kl_coef must be finite and at least 0, got -1\.0"),
        ({"estimator": "k1"}, r"estimator must be one of \['abs', 'k3'\], got 'k1'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        kl_cov(**options)

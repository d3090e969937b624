"""Policy-gradient losses against loops in NumPy, at their bounds, and on garbage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import normalisers, surrogates
from jentropy.base import initial_plan
from jentropy.mechanisms.clip_range import clip_range

OLD = np.zeros((2, 4), np.float32)
RATIO = np.array([[0.5, 1.1, 1.5, 0.9], [1.5, 0.5, 4.0, 7.0]])
ADVANTAGE = np.array([[2.0, 1.0, 1.0, -1.0], [-1.0, -2.0, -0.5, 9.0]], np.float32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)


def make(mask=MASK, log_prob=None, advantage=ADVANTAGE):
    log_prob = np.log(RATIO).astype(np.float32) if log_prob is None else np.asarray(log_prob, np.float32)
    signals = toy.signals(toy.rollouts(mask, logp_old=OLD[: len(mask), : mask.shape[1]]), log_prob=log_prob)
    return signals, toy.update(clip_range(epsilon_low=0.2, epsilon_high=0.3), signals, jnp.asarray(advantage))


def run(surrogate, signals, plan):
    return toy.loss_and_gradient(plan, signals, surrogate=surrogate, normaliser=normalisers.token_sum)


def test_ratio_by_hand():
    value, gradient, metrics = run(surrogates.ratio, *make())
    # -min(r A, clip(r, .8, 1.3) A): clipped where A > 0 and r > 1.3, or A < 0 and r < .8.
    expected = np.array([[-1.0, -1.1, -1.3, 0.9], [1.5, 1.6, 2.0, 0.0]])
    active = np.array([[1, 1, 0, 1], [1, 0, 1, 0]])
    np.testing.assert_allclose(value, expected.sum(), rtol=2e-6)
    np.testing.assert_allclose(gradient, -active * RATIO * ADVANTAGE, rtol=2e-6)
    sums = {k: float(total) for k, (total, count) in metrics.items() if count == 7.0}
    assert sums.pop("actor/ppo_kl") == pytest.approx(-np.log(RATIO)[MASK].sum(), rel=2e-6)
    assert sums == {
        "actor/pg_clipfrac": 2.0,
        "clip_ratio/low_mean": 1.0,
        "clip_ratio/high_mean": 1.0,
        "clip_ratio/region_mean": 2.0,
    }


def test_without_bounds_the_loss_is_minus_ratio_times_advantage():
    signals, _ = make()
    value, _, metrics = run(surrogates.ratio, signals, initial_plan(signals.batch, jnp.asarray(ADVANTAGE)))
    np.testing.assert_allclose(value, -(RATIO * ADVANTAGE)[MASK].sum(), rtol=2e-6)
    assert metrics["actor/pg_clipfrac"][0] == 0.0


def test_dual_clip_by_hand():
    value, gradient, metrics = run(surrogates.dual_clip(clip_ratio_c=3.0), *make())
    expected = np.array([[-1.0, -1.1, -1.3, 0.9], [1.5, 1.6, 1.5, 0.0]])  # [1, 2]: c |A| = 1.5 < 2
    active = np.array([[1, 1, 0, 1], [1, 0, 0, 0]])
    np.testing.assert_allclose(value, expected.sum(), rtol=2e-6)
    np.testing.assert_allclose(gradient, -active * RATIO * ADVANTAGE, rtol=2e-6)
    assert metrics["actor/pg_clipfrac_lower"] == (1.0, 7.0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gradient_lives_at_the_bound(advantage):
    signals, plan = make(np.ones((1, 1), bool), [[0.0]], np.full((1, 1), advantage, np.float32))
    plan = plan.replace(ratio_low=jnp.ones((1, 1)), ratio_high=jnp.ones((1, 1)))
    _, gradient, metrics = run(surrogates.ratio, signals, plan)
    assert gradient == -advantage
    assert metrics["actor/pg_clipfrac"][0] == 0.0


def test_far_policies_give_finite_losses_and_no_gradient():
    signals, plan = make(np.ones((1, 2), bool), [[-500.0, 500.0]], np.array([[1.0, -1.0]], np.float32))
    value, gradient, _ = run(surrogates.ratio, signals, plan)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient, [[0.0, 0.0]])


@pytest.mark.parametrize("surrogate", [surrogates.ratio, surrogates.dual_clip(), surrogates.reinforce])
def test_nothing_outside_the_mask_matters(surrogate):
    signals, plan = make()
    value, gradient, metrics = run(surrogate, signals, plan)
    batch = signals.batch.replace(logp_old=jnp.where(MASK, signals.batch.logp_old, -jnp.inf))
    dirty = toy.signals(batch, log_prob=jnp.where(MASK, signals.scores["log_prob"], jnp.nan))
    same = run(surrogate, dirty, plan.replace(advantage=jnp.where(MASK, plan.advantage, jnp.inf)))
    jax.tree.map(np.testing.assert_array_equal, (value, gradient, metrics), same)


def test_metrics_count_tokens_with_a_policy_gradient():
    signals, plan = make()
    plan = plan.replace(pg_weight=plan.pg_weight.at[0].set(0.0))
    _, _, metrics = run(surrogates.ratio, signals, plan)
    assert metrics["actor/pg_clipfrac"] == (1.0, 3.0)


def test_reinforce_has_the_gradient_of_the_ratio_at_the_old_policy():
    signals, plan = make(log_prob=OLD)
    value, gradient, metrics = run(surrogates.reinforce, signals, plan)
    np.testing.assert_array_equal(gradient, run(surrogates.ratio, signals, plan)[1])
    np.testing.assert_array_equal(gradient, np.where(MASK, -ADVANTAGE, 0.0))
    assert value == 0.0 and metrics["actor/ppo_kl"][0] == 0.0


def test_dual_clip_compares_by_value_and_refuses_numbers_up_to_one():
    assert hash(surrogates.dual_clip()) == hash(surrogates.dual_clip(clip_ratio_c=3))
    assert surrogates.dual_clip() != surrogates.dual_clip(clip_ratio_c=10.0)
    with pytest.raises(ValueError, match=r"clip_ratio_c must be above 1, got 1\.0"):
        surrogates.dual_clip(clip_ratio_c=1.0)

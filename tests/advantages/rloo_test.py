"""RLOO against its own definition."""

import numpy as np
import pytest
import toy

from jentropy.advantages.rloo import rloo

GROUP = np.array([3, 0, 3, 0, 3, 1])
REWARDS = np.array([1.0, 0.1, 0.0, 0.1, 0.5, 2.0], np.float32)
MASK = np.tril(np.ones((6, 6), bool))


def run(estimator, rewards=REWARDS, **row_data):
    return toy.estimate(estimator, toy.rollouts(MASK, rewards=rewards, group=GROUP, row_data=row_data))[0]


def leave_one_out(rewards, rows):
    """`R_i` minus the mean of the other rows of its group, 0 without others."""
    others = [[j for j in rows if GROUP[j] == GROUP[i] and j != i] for i in range(6)]
    return np.array([rewards[i] - np.mean(rewards[o]) if o and i in rows else 0.0 for i, o in enumerate(others)])


def test_by_definition():
    expected = leave_one_out(REWARDS, range(6))
    np.testing.assert_allclose(run(rloo()), np.where(MASK, expected[:, None], 0.0), rtol=1e-6, atol=1e-7)


def test_equal_rewards_are_exactly_zero():
    assert not run(rloo(), np.full(6, 0.1, np.float32)).any()


def test_rows_that_are_not_valid_do_not_take_part():
    rewards = REWARDS.copy()
    rewards[2] = np.nan
    valid = np.isfinite(rewards)
    expected = leave_one_out(rewards, np.flatnonzero(valid))
    np.testing.assert_allclose(run(rloo(), rewards, is_valid=valid)[:, 0], expected, rtol=1e-6, atol=1e-7)


def test_single_rows():
    assert not run(rloo())[5].any()
    np.testing.assert_array_equal(run(rloo(singleton="raw"))[5], np.full(6, 2.0))
    assert rloo().min_group_size == 2 and rloo(singleton="raw").min_group_size == 1


@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_the_divergence_of_the_whole_response_is_in_the_reward(fill):
    old = np.where(MASK, -np.arange(36.0).reshape(6, 6) / 16, fill).astype(np.float32)
    ref = np.where(MASK, -1.0, fill).astype(np.float32)
    rollouts = toy.rollouts(
        MASK, rewards=REWARDS, group=GROUP, logp_old=old, token_data={"ref_log_prob": ref}, row_data={}
    )
    estimator = rloo(kl_coef=0.5)
    advantage, metrics = toy.estimate(estimator, rollouts)
    divergence = np.where(MASK, old + 1.0, 0.0).sum(axis=1)
    expected = leave_one_out(REWARDS - 0.5 * divergence, range(6))
    np.testing.assert_allclose(advantage, np.where(MASK, expected[:, None], 0.0), rtol=1e-5)
    assert advantage[1].any()  # of equal rewards, and of different divergences
    assert metrics["actor/reward_kl_penalty"] == (divergence.sum(), MASK.sum())
    np.testing.assert_allclose(metrics["critic/rewards/mean"], (REWARDS.sum(), 6.0), rtol=1e-6)
    assert estimator.requires == ("ref_log_prob",) and rloo().requires == ()


def test_without_the_reference():
    with pytest.raises(ValueError, match=r"a kl_coef above 0 needs token_data\['ref_log_prob'\], got \[\]"):
        run(rloo(kl_coef=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"singleton": "mean"}, "singleton must be zero or raw, got 'mean'"),
        ({"kl_coef": -1.0}, r"kl_coef must be finite and at least 0, got -1\.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        rloo(**options)

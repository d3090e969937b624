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


def test_refusal():
    with pytest.raises(ValueError, match="singleton must be zero or raw, got 'mean'"):
        rloo(singleton="mean")

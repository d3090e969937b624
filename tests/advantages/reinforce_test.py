"""REINFORCE by hand."""

import numpy as np
import pytest
import toy

from jentropy.advantages.reinforce import reinforce

MASK = np.array([[1, 1], [1, 0], [0, 0]], bool)
REWARDS = np.array([1.0, -1.0, 3.0], np.float32)


def run(estimator, **row_data):
    return toy.estimate(estimator, toy.rollouts(MASK, rewards=REWARDS, row_data=row_data))


def test_the_reward_on_every_token():
    advantage, metrics = run(reinforce())
    np.testing.assert_array_equal(advantage, [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    assert metrics["critic/rewards/mean"] == (3.0, 3.0) and metrics["critic/advantages/mean"] == (1.0, 3.0)


def test_the_mean_of_valid_rows_as_baseline():
    advantage, _ = run(reinforce(baseline="batch_mean"))
    np.testing.assert_array_equal(advantage[:, 0], [0.0, -2.0, 0.0])
    advantage, _ = run(reinforce(baseline="batch_mean"), is_valid=np.array([True, True, False]))
    np.testing.assert_array_equal(advantage[:, 0], [1.0, -1.0, 0.0])


def test_refusal():
    with pytest.raises(ValueError, match="baseline must be none or batch_mean, got 'greedy'"):
        reinforce(baseline="greedy")

"""Rewards of a row: weights, rows that do not take part, and metrics of groups."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import outcome

MASK = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]], bool)
REWARDS = np.array([[1.0, 2.0], [0.5, 0.0], [0.0, 4.0], [np.nan, 1.0], [3.0, 3.0]], np.float32)
VALID = np.array([True, True, True, False, True])


def batch(**kwargs):
    return toy.rollouts(MASK, rewards=REWARDS, row_data={"is_valid": VALID}, **kwargs)


def test_weighted_sum_of_valid_rows():
    np.testing.assert_array_equal(outcome.total_reward(batch(), outcome.weights_state(None)), [3, 0.5, 4, 0, 6])
    weights = outcome.weights_state((2.0, 0.5))
    np.testing.assert_array_equal(outcome.total_reward(batch(), weights), [3, 1, 2, 0, 7.5])


def test_wrong_number_of_weights():
    with pytest.raises(ValueError, match="reward_weights has 3 numbers for 2 reward columns"):
        outcome.total_reward(batch(), outcome.weights_state((1.0, 1.0, 1.0)))


def test_all_rows_are_valid_by_default():
    assert outcome.valid_rows(toy.rollouts(MASK)).all()


def test_spread():
    expected = np.where(MASK & VALID[:, None], np.arange(5.0)[:, None], 0.0)
    np.testing.assert_array_equal(outcome.spread(jnp.arange(5.0), batch()), expected)


def test_metrics_count_groups_once_wherever_their_rows_stand():
    # Valid groups: {0, 4} with rewards 3 and 6, {1} with 0.5, {2} with 4. Row 3 is alone in its group and not valid.
    rollouts = batch(group=[0, 1, 2, 4, 0])
    reward = outcome.total_reward(rollouts, outcome.weights_state(None))
    metrics = outcome.metrics(rollouts, reward, outcome.spread(reward, rollouts))
    assert metrics["critic/rewards/mean"] == (13.5, 4.0)
    assert metrics["critic/advantages/mean"] == (3.0 * 2 + 0.5 + 6.0, 4.0)
    assert metrics["frac_reward_zero_std"] == (2.0, 3.0)
    np.testing.assert_allclose(metrics["reward_std"], (np.std([3, 6], ddof=1), 3.0), rtol=1e-6)

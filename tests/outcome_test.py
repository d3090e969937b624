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


def test_a_reward_that_a_grader_does_not_have_is_not_of_the_sum():
    known = np.array([[1, 0], [0, 0], [1, 1], [1, 1], [0, 1]], bool)
    rewards = np.where(known, REWARDS, np.nan)
    rollouts = toy.rollouts(MASK, rewards=rewards, row_data={"is_valid": VALID, "reward_is_valid": known})
    np.testing.assert_array_equal(outcome.valid_rewards(rollouts), known & VALID[:, None])
    np.testing.assert_array_equal(outcome.total_reward(rollouts, outcome.weights_state(None)), [1, 0, 4, 0, 3])
    metrics = outcome.metrics(rollouts, jnp.zeros(5), jnp.zeros(MASK.shape))
    assert metrics["rewards/0/mean"] == (1.0, 2.0) and metrics["rewards/1/mean"] == (7.0, 2.0)


def test_rewards_of_each_column_are_reported_if_there_are_several():
    rollouts = batch()
    metrics = outcome.metrics(rollouts, jnp.zeros(5), jnp.zeros(MASK.shape))
    assert metrics["rewards/0/mean"] == (4.5, 4.0) and metrics["rewards/1/mean"] == (9.0, 4.0)
    one = toy.rollouts(MASK, rewards=REWARDS[:, 0], row_data={"is_valid": VALID})
    assert (
        not {"rewards/0/mean", "reward_resolution"} & outcome.metrics(one, jnp.zeros(5), jnp.zeros(MASK.shape)).keys()
    )


CORNERS = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], np.float32)


def resolution(rewards, advantage, **kwargs):
    rewards = np.asarray(rewards, np.float32)
    mask = kwargs.pop("mask", np.ones((len(rewards), 2), bool))
    rollouts = toy.rollouts(mask, rewards=rewards, **kwargs)
    advantage = jnp.where(mask, jnp.asarray(advantage, jnp.float32)[:, None], jnp.nan)
    return tuple(float(x) for x in outcome.reward_resolution(rollouts, advantage))


def test_resolution_by_hand():
    assert resolution(CORNERS, [1.0, 0.0, 0.0, -1.0]) == (3.0, 4.0)
    assert resolution(CORNERS, [1.0, 0.5, 0.0, -1.0]) == (4.0, 4.0)
    assert resolution(CORNERS, np.zeros(4)) == (1.0, 4.0)
    assert resolution(CORNERS[[0, 1, 1, 0, 2]], [1.0, 0.0, 0.0, 1.0, 0.0]) == (2.0, 3.0)


def test_resolution_is_of_groups():
    rewards, advantage = CORNERS[[0, 1, 1, 2, 3, 3]], [1.0, 0.0, 0.0, 0.0, 5.0, 5.0]
    # {0, 1}: 2 of 2; {2, 3}: one advantage for 2 vectors; {4, 5}: equal rewards, nothing to tell apart.
    assert resolution(rewards, advantage, group=[3, 3, 1, 1, 0, 0]) == (3.0, 4.0)
    order = [4, 2, 0, 5, 1, 3]
    group = np.array([3, 3, 1, 1, 0, 0])[order]
    assert resolution(rewards[order], np.array(advantage)[order], group=group) == (3.0, 4.0)


def test_resolution_does_not_count_rounding():
    assert resolution(CORNERS, [100.0, 1e-3, 2e-4, -100.0]) == (3.0, 4.0)
    assert resolution(CORNERS, [100.0, 2e-3, 0.0, -100.0]) == (4.0, 4.0)
    chain = [1.0, 0.999992, 0.999984, 0.0]  # neighbours are the same, so all three are, in any order
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 2, 0]):
        assert resolution(CORNERS[order], np.array(chain)[order]) == (2.0, 4.0)


def test_resolution_of_rows_that_take_part():
    mask = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], bool)  # row 2 has no tokens, row 3 is not valid
    valid = np.array([True, True, True, False])
    rewards = np.where(valid[:, None], CORNERS, np.nan)
    assert resolution(rewards, [1.0, 0.5, 0.0, -1.0], mask=mask, row_data={"is_valid": valid}) == (2.0, 2.0)
    known = np.array([[1, 1], [1, 0], [1, 1], [1, 1]], bool)  # (1, nothing) is not (1, 0)
    rewards = np.where(known, [[1, 0], [1, 0], [1, 1], [1, 1]], np.nan)
    assert resolution(rewards, [1.0, 0.5, 0.5, 0.5], row_data={"reward_is_valid": known}) == (2.0, 3.0)


def test_resolution_of_nothing():
    assert resolution(CORNERS, np.zeros(4), mask=np.zeros((4, 2), bool)) == (0.0, 0.0)
    assert resolution(np.ones((3, 2)), np.zeros(3)) == (0.0, 0.0)


def test_last_token():
    mask = np.array([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
    wanted = np.zeros_like(mask)
    wanted[[0, 1, 3], [3, 4, 0]] = True
    np.testing.assert_array_equal(outcome.last_token(jnp.asarray(mask)), wanted)

"""ReMax by hand."""

import numpy as np
import pytest
import toy

from jentropy.advantages.remax import remax

MASK = np.array([[0, 1, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]], bool)
REWARDS = np.array([[1.0, 2.0], [0.0, 4.0], [3.0, 0.0], [0.5, 0.5]], np.float32)
GREEDY = np.array([1.0, 1.0, 2.0, 0.25], np.float32)


def run(estimator, rewards=REWARDS, **row_data):
    return toy.estimate(estimator, toy.rollouts(MASK, rewards=rewards, row_data=row_data))


def test_by_hand():
    advantage, metrics = run(remax()._replace(init=lambda: remax().init((1.0, 0.5))), greedy_reward=GREEDY)
    np.testing.assert_array_equal(advantage, [[0, 1, 1], [0, 1, 0], [0, 0, 0], [0, 0.5, 0.5]])
    assert metrics["critic/greedy_rewards/mean"] == (4.25, 4.0)
    assert metrics["critic/rewards/mean"] == (2.0 + 2.0 + 3.0 + 0.75, 4.0)


def test_the_baseline_is_the_row_s_own_and_one_response_is_enough():
    assert remax().min_group_size == 1 and remax().requires == ("greedy_reward",)
    assert not run(remax(), greedy_reward=REWARDS.sum(1))[0].any()


def test_rows_that_are_not_valid():
    rewards, greedy = REWARDS.copy(), GREEDY.copy()
    rewards[0], greedy[3] = np.nan, np.nan
    valid = np.array([False, True, True, False])
    advantage, metrics = run(remax(), rewards, greedy_reward=greedy, is_valid=valid)
    np.testing.assert_array_equal(advantage, [[0, 0, 0], [0, 3, 0], [0, 0, 0], [0, 0, 0]])
    assert metrics["critic/greedy_rewards/mean"] == (3.0, 2.0)


def test_without_the_greedy_reward():
    with pytest.raises(ValueError, match=r"remax needs row_data\['greedy_reward'\], got \['accuracy'\]"):
        run(remax(), accuracy=GREEDY)

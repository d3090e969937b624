"""OPO against a loop over groups."""

import numpy as np
import pytest
import toy

from jentropy.advantages.opo import opo

GROUP = np.array([3, 0, 3, 0, 3, 1, 0])
REWARDS = np.array([1.0, 0.1, 0.0, 0.1, 0.5, 2.0, 0.1], np.float32)
MASK = np.arange(6)[None, :] < np.array([1, 2, 3, 4, 5, 6, 3])[:, None]


def run(estimator, rewards=REWARDS, mask=MASK, **row_data):
    return toy.estimate(estimator, toy.rollouts(mask, rewards=rewards, group=GROUP, row_data=row_data))[0]


def test_by_hand():
    # Group 3: rewards 1, 0, .5 with lengths 1, 3, 5: baseline 3.5 / 9.
    wanted = np.array([1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0]) - np.isin(np.arange(7), [0, 2, 4]) * (3.5 / 9)
    np.testing.assert_allclose(run(opo()), np.where(MASK, wanted[:, None], 0.0), rtol=1e-6, atol=1e-7)


def test_the_gradients_of_a_group_cancel_where_all_tokens_have_one_gradient():
    np.testing.assert_allclose(run(opo())[GROUP == 3].sum(), 0.0, atol=1e-6)


def test_equal_rewards_are_exactly_zero():
    assert not run(opo(), np.full(7, 0.1, np.float32)).any()
    assert not run(opo(singleton="raw"))[GROUP == 0].any()


def test_a_response_without_tokens_does_not_weigh():
    mask, rewards = MASK.copy(), np.full(7, 0.1, np.float32)
    mask[0], rewards[0] = False, 7.0
    assert not run(opo(), rewards, mask).any()
    assert not run(opo(), mask=np.zeros_like(MASK)).any()


def test_rows_that_are_not_valid_do_not_take_part():
    rewards = REWARDS.copy()
    rewards[2] = np.nan
    advantage = run(opo(), rewards, is_valid=np.isfinite(rewards))
    baseline = (1.0 * 1 + 0.5 * 5) / 6
    np.testing.assert_allclose(advantage[[0, 2, 4], 0], [1.0 - baseline, 0.0, 0.5 - baseline], rtol=1e-6)


def test_single_rows():
    assert not run(opo())[5].any()
    np.testing.assert_array_equal(run(opo(singleton="raw"))[5], np.full(6, 2.0))
    assert opo().min_group_size == 2 and opo(singleton="raw").min_group_size == 1


def test_refusal():
    with pytest.raises(ValueError, match="singleton must be zero or raw, got 'mean'"):
        opo(singleton="mean")

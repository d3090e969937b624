"""GRPO by hand, on equal rewards, single rows and rows that do not take part."""

import jax
import numpy as np
import pytest
import toy

from jentropy.advantages.grpo import grpo

GROUP = np.array([3, 0, 3, 0, 3, 1])
REWARDS = np.array([1.0, 0.1, 0.0, 0.1, 0.5, 2.0], np.float32)
MASK = np.tril(np.ones((6, 6), bool))


def run(estimator, rewards=REWARDS, group=GROUP, **row_data):
    return toy.estimate(estimator, toy.rollouts(MASK, rewards=rewards, group=group, row_data=row_data))


def test_by_hand():
    advantage, metrics = run(grpo(epsilon=0.01))
    expected = np.array([0.5, 0.0, -0.5, 0.0, 0.0, 0.0]) / (0.5 + 0.01)  # std of (1, 0, 0.5), ddof 1, is 0.5
    np.testing.assert_allclose(advantage, np.where(MASK, expected[:, None], 0.0), rtol=1e-6)
    assert metrics["frac_reward_zero_std"] == (2.0, 3.0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_are_exactly_zero(scale):
    rewards = np.full(6, 0.1, np.float32)  # the mean of three rounds away from 0.1
    assert not run(grpo(scale_rewards=scale), rewards)[0].any()


def test_scales():
    centred = np.array([0.5, 0.0, -0.5, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(run(grpo(scale_rewards="none", epsilon=0.5))[0][:, 0], centred)
    std = REWARDS.std(ddof=1, dtype=np.float64)
    np.testing.assert_allclose(run(grpo(scale_rewards="batch"))[0][:, 0], centred / (std + 1e-6), rtol=1e-6)


def test_single_rows():
    assert not run(grpo())[0][5].any()
    np.testing.assert_allclose(run(grpo(singleton="raw"))[0][5], np.full(6, 2.0), rtol=2e-6)
    assert not run(grpo(singleton="raw"))[0][[1, 3]].any()
    assert grpo().min_group_size == 2 and grpo(singleton="raw").min_group_size == 1


def test_rows_that_are_not_valid_do_not_take_part():
    rewards = np.append(REWARDS[:5], np.nan).astype(np.float32)
    valid = np.array([True, True, True, True, False, False])
    advantage, _ = run(grpo(), rewards, is_valid=valid)
    expected = np.array([0.5, 0.0, -0.5, 0.0, 0.0, 0.0]) / (np.std([1.0, 0.0], ddof=1) + 1e-6)
    np.testing.assert_allclose(advantage[:, 0], expected, rtol=1e-6)


def test_the_order_of_rows_does_not_matter():
    order = np.array([4, 2, 0, 5, 1, 3])
    rollouts = toy.rollouts(MASK[order], rewards=REWARDS[order], group=GROUP[order])
    np.testing.assert_allclose(toy.estimate(grpo(), rollouts)[0], run(grpo())[0][order], rtol=1e-6)


def test_reward_weights_are_numbers_of_the_state():
    columns = np.stack([REWARDS, np.full_like(REWARDS, 7.0)], axis=1)
    weighted = grpo(reward_weights=(2.0, 0.0), scale_rewards="none")
    np.testing.assert_allclose(
        run(weighted, columns)[0], 2.0 * run(grpo(scale_rewards="none"))[0], rtol=1e-6, atol=1e-7
    )
    assert weighted.init().reward_weights.shape == (2,)
    with pytest.raises(ValueError, match="reward_weights has 2 numbers for 1 reward columns"):
        grpo(reward_weights=(1.0, 1.0)).estimate(toy.rollouts(MASK), grpo(reward_weights=(1.0, 1.0)).init())


def test_the_state_returns_unchanged():
    state = grpo(epsilon=0.5).init()
    rollouts = toy.rollouts(MASK, rewards=REWARDS, group=GROUP, row_data={})
    assert jax.jit(grpo().estimate)(rollouts, state)[3] == state == (1.0, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_rewards": "rows"}, "scale_rewards must be group, batch or none, got 'rows'"),
        ({"epsilon": 0.0}, r"epsilon must be above 0, got 0\.0"),
        ({"singleton": "one"}, "singleton must be zero or raw, got 'one'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        grpo(**options)

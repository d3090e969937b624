"""S-GRPO by hand, on ties, rewards that are no grades, and against its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from golden_cases import DOUBLE, close, make_test

from jentropy.advantages.s_grpo import s_grpo

GROUP = np.array([2, 0, 2, 2, 0, 2])
ORDER = np.array([3, 1, 0, 1, 0, 2], np.int32)
REWARDS = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], np.float32)
MASK = np.tril(np.ones((6, 6), bool))
DECAYED = np.array([0.25, 0.5, 0.0, 1.0, 1.0, 0.5])
MEAN = np.where(GROUP == 2, 1.75 / 4, 0.75)


def run(estimator, rewards=REWARDS, mask=MASK, group=GROUP, row_id=None, **row_data):
    row_data = {"exit_order": ORDER, **row_data}
    return toy.estimate(estimator, toy.rollouts(mask, rewards=rewards, group=group, row_id=row_id, row_data=row_data))


def test_by_hand():
    advantage, metrics = run(s_grpo())
    np.testing.assert_allclose(advantage, np.where(MASK, (DECAYED - MEAN)[:, None], 0.0), rtol=1e-6)
    assert metrics["s_grpo/decayed_reward/mean"] == (3.25, 6.0)
    assert metrics["critic/rewards/mean"] == (5.0, 6.0)
    assert metrics["error/reward is not 0 or 1"][0] == 0.0


def test_without_decay_every_correct_answer_earns_the_same():
    mean = np.where(GROUP == 2, 0.75, 1.0)
    np.testing.assert_allclose(run(s_grpo(decay=1.0))[0][:, 0], REWARDS - mean, rtol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_are_exactly_zero(reward):
    assert not run(s_grpo(decay=1.0), np.full(6, reward, np.float32))[0].any()
    assert not run(s_grpo(), np.zeros(6, np.float32))[0].any()
    alone = run(s_grpo(), np.full(6, reward, np.float32), group=np.arange(6))[0]
    assert not alone.any() and s_grpo().min_group_size == 2


def test_ties_break_by_row_id():
    order, row_id = np.zeros(6, np.int32), np.array([5, 0, 9, 2, 7, 3])
    found = run(s_grpo(), row_id=row_id, exit_order=order)[0][:, 0]
    decayed = np.array([0.25, 1.0, 0.0, 1.0, 0.5, 0.5])
    np.testing.assert_allclose(found, decayed - MEAN, rtol=1e-6)


def test_the_order_of_rows_and_rows_that_are_not_valid():
    order = np.array([4, 2, 6, 0, 5, 1, 3])
    valid, rewards = np.arange(7) < 6, np.append(REWARDS, np.nan).astype(np.float32)
    mask = np.concatenate([MASK, np.ones((1, 6), bool)])
    found = run(
        s_grpo(), rewards[order], mask[order], np.append(GROUP, 2)[order], np.arange(7)[order],
        exit_order=np.append(ORDER, 0).astype(np.int32)[order], is_valid=valid[order],
    )[0]  # fmt: skip
    wanted = np.concatenate([run(s_grpo())[0], np.zeros((1, 6))])
    np.testing.assert_allclose(found, wanted[order], rtol=1e-6)


def test_rewards_that_are_no_grades_are_reported():
    rewards = np.array([0.5, 1.0, np.nan, -1.0, 1.0, 1.0], np.float32)
    metrics = run(s_grpo(), rewards, is_valid=np.arange(6) != 2)[1]
    assert metrics["error/reward is not 0 or 1"][0] == 2.0


def test_reward_weights():
    columns = np.stack([REWARDS, np.full_like(REWARDS, 7.0)], axis=1)
    np.testing.assert_array_equal(run(s_grpo(reward_weights=(1.0, 0.0)), columns)[0], run(s_grpo())[0])


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, float("nan")])
def test_refusals(decay):
    with pytest.raises(ValueError, match=f"decay must be above 0 and at most 1, got {decay}"):
        s_grpo(decay=decay)


def test_rows_without_an_order_are_refused():
    with pytest.raises(ValueError, match=r"s_grpo needs row_data\['exit_order'\], got \['is_valid'\]"):
        s_grpo().estimate(toy.rollouts(MASK, row_data={"is_valid": np.ones(6, bool)}), s_grpo().init())


def check_s_grpo(golden, precision):
    """`base_sgrpo*`: one group a line, the full response last; `decay` there is 1 / d."""
    del precision
    correct = golden["correct_early_to_full"]
    num_groups, size = correct.shape
    rows = toy.rollouts(
        np.ones((correct.size, 1), bool),
        rewards=correct.reshape(-1).astype(np.float64),
        group=np.repeat(np.arange(num_groups), size),
        row_data={"exit_order": np.tile(np.arange(size, dtype=np.int32), num_groups)},
    )
    estimator = s_grpo(decay=1.0 / float(golden.get("decay", 2.0)))
    advantage, _, metrics, _ = jax.jit(estimator.estimate)(rows, estimator.init())
    close(advantage[:, 0].reshape(correct.shape), golden["advantages"], 1e-12)
    close(jnp.asarray(metrics["s_grpo/decayed_reward/mean"][0]), golden["rewards"].sum(), 1e-12)


test_released_code = make_test({"base_sgrpo*": (check_s_grpo, DOUBLE)})

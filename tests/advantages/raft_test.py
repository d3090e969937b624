"""RAFT and Reinforce-Rej by hand, and the rewards they refuse."""

import numpy as np
import pytest
import toy

from jentropy.advantages.raft import raft, reinforce_rej

GROUP = np.array([3, 0, 3, 0, 4, 4, 1, 2])
SIGNED = np.array([1, 1, -1, 1, -1, -1, 1, -1], np.float32)
BINARY = (SIGNED + 1) / 2
MASK = np.tril(np.ones((8, 8), bool))
MASK[3] = False
ERRORS = {"signed": "error/reward is not -1 or 1", "binary": "error/reward is not 0 or 1"}
KINDS = [("signed", SIGNED), ("binary", BINARY)]


def run(estimator, rewards, **row_data):
    return toy.estimate(estimator, toy.rollouts(MASK, rewards=rewards, group=GROUP, row_data=row_data))


@pytest.mark.parametrize(("kind", "rewards"), KINDS)
def test_raft_learns_from_correct_responses(kind, rewards):
    advantage, metrics = run(raft(rewards=kind), rewards)
    np.testing.assert_array_equal(advantage, np.where(MASK, BINARY[:, None], 0.0))
    assert metrics[ERRORS[kind]] == (0.0, 1.0) and metrics["critic/rewards/mean"] == (rewards.sum(), 8.0)
    assert raft().min_group_size == 1


@pytest.mark.parametrize(("kind", "rewards"), KINDS)
def test_reinforce_rej_learns_from_mixed_groups(kind, rewards):
    advantage, metrics = run(reinforce_rej(rewards=kind), rewards)
    np.testing.assert_array_equal(advantage, np.where(MASK, [[1], [0], [-1], [0], [0], [0], [0], [0]], 0.0))
    assert metrics[ERRORS[kind]] == (0.0, 1.0) and metrics["frac_reward_zero_std"] == (4.0, 5.0)


@pytest.mark.parametrize(("kind", "rewards"), KINDS)
def test_single_rows(kind, rewards):
    advantage, _ = run(reinforce_rej(rewards=kind, singleton="raw"), rewards)
    np.testing.assert_array_equal(advantage[:, 0], [1, 0, -1, 0, 0, 0, 1, -1])
    assert reinforce_rej().min_group_size == 2 and reinforce_rej(singleton="raw").min_group_size == 1


@pytest.mark.parametrize("factory", [raft, reinforce_rej])
@pytest.mark.parametrize(("kind", "bad"), [("signed", 0.0), ("binary", -1.0), ("signed", np.nan), ("binary", 0.5)])
def test_other_rewards_are_counted_in_valid_rows(factory, kind, bad):
    rewards = dict(KINDS)[kind].copy()
    rewards[[1, 2, 4]] = bad
    assert run(factory(rewards=kind), rewards)[1][ERRORS[kind]] == (3.0, 1.0)
    valid = ~np.isin(np.arange(8), [1, 2])
    assert run(factory(rewards=kind), rewards, is_valid=valid)[1][ERRORS[kind]] == (1.0, 1.0)


def test_rows_that_are_not_valid_are_not_of_the_group():
    rewards = SIGNED.copy()
    rewards[2] = np.nan
    valid = np.isfinite(rewards)
    assert not run(reinforce_rej(), rewards, is_valid=valid)[0].any()
    np.testing.assert_array_equal(run(raft(), rewards, is_valid=valid)[0][:3, 0], [1.0, 1.0, 0.0])


def test_the_two_numbers_are_those_of_the_weighted_sum():
    columns = np.stack([BINARY, np.full(8, 9.0, np.float32)], axis=1)
    advantage, metrics = run(raft(rewards="binary", reward_weights=(1.0, 0.0)), columns)
    np.testing.assert_array_equal(advantage, run(raft(rewards="binary"), BINARY)[0])
    assert metrics[ERRORS["binary"]] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (raft, {"rewards": "raw"}, "rewards must be signed or binary, got 'raw'"),
        (reinforce_rej, {"rewards": "raw"}, "rewards must be signed or binary, got 'raw'"),
        (reinforce_rej, {"singleton": "one"}, "singleton must be zero or raw, got 'one'"),
    ],
)
def test_refusals(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**options)

"""GDPO by hand and against loops: rewards one by one, their sum, its normalisation over sequences or tokens."""

import jax
import numpy as np
import pytest
import toy

from jentropy import outcome
from jentropy.advantages.gdpo import gdpo
from jentropy.advantages.grpo import grpo

CORNERS = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], np.float32)
GROUP = np.array([3, 0, 3, 0, 3, 1, 0, 3])
MASK = np.arange(8)[None, :] < np.array([3, 1, 8, 2, 0, 5, 4, 1])[:, None]


def rewards_of(seed=0):
    """`[8, 2]`: a binary one and a graded one of much larger spread."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, 2, 8), 50.0 * rng.normal(size=8)], axis=1).astype(np.float32)


def run(estimator, rewards, group=None, mask=None, **row_data):
    mask = np.ones((len(rewards), 8), bool) if mask is None else mask
    group = np.zeros(len(rewards), np.int32) if group is None else group
    all_given = {"is_valid": np.ones(len(rewards), bool), "reward_is_valid": np.ones(rewards.shape, bool)}
    batch = toy.rollouts(mask, rewards=np.float32(rewards), group=group, row_data={**all_given, **row_data})
    return toy.estimate(estimator, batch)


def summed(rewards, group, weights, epsilon, known=None):
    """Σ_k w_k (r - mean) / (std + ε) by loops in float64, `[B]`."""
    rewards, total = np.asarray(rewards, np.float64), np.zeros(len(rewards))
    known = np.ones(rewards.shape, bool) if known is None else known
    for k, weight in enumerate(weights):
        for g in np.unique(group):
            rows = (group == g) & known[:, k]
            if rows.sum() > 1 and np.ptp(rewards[rows, k]) > 0:
                x = rewards[rows, k]
                total[rows] += weight * (x - x.mean()) / (x.std(ddof=1) + epsilon)
    return total


@pytest.mark.parametrize(("weights", "expected"), [(None, [1.5, 0.0, 0.0, -1.5]), ((2.0, 1.0), [1.5, 0.5, -0.5, -1.5])])
def test_four_combinations_by_hand(weights, expected):
    std = np.std([1, 1, 0, 0], ddof=1)
    plain, _ = run(gdpo(reward_weights=weights, final_norm="none", epsilon=0.01), CORNERS)
    sums = np.array(expected) / 1.5 * (1.0 if weights is None else 1.5)
    np.testing.assert_allclose(plain[:, 0], sums / (std + 0.01), rtol=1e-6, atol=1e-7)
    final, _ = run(gdpo(reward_weights=weights, epsilon=0.01), CORNERS)
    x = sums / (std + 0.01)
    np.testing.assert_allclose(final[:, 0], x / (x.std(ddof=1) + 0.01), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, -0.5)])
def test_sequences_against_a_loop(weights):
    rewards = rewards_of()
    advantage, metrics = run(gdpo(reward_weights=weights, epsilon=0.01), rewards, GROUP, MASK)
    total = summed(rewards, GROUP, weights, 0.01)
    expected = (total - total.mean()) / (total.std(ddof=1) + 0.01)  # row 4 has no tokens, yet is of the statistics
    np.testing.assert_allclose(advantage, np.where(MASK, expected[:, None], 0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards/1/mean"], (rewards[:, 1].sum(), 8.0), rtol=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, -0.5)])
def test_tokens_against_a_loop(weights):
    rewards = rewards_of()
    advantage, _ = run(gdpo(reward_weights=weights, epsilon=1e-6, final_norm="token"), rewards, GROUP, MASK)
    tokens = np.broadcast_to(summed(rewards, GROUP, weights, 1e-6)[:, None], MASK.shape)
    inside = tokens[MASK]
    expected = (tokens - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(advantage, np.where(MASK, expected, 0.0), rtol=1e-5, atol=1e-6)
    assert advantage[5].any(), "a group of one row gets what the mean of the tokens leaves over, as in verl"


def test_a_reward_without_variance_adds_exactly_zero():
    rewards = rewards_of()
    constant, other = np.array([0.1, 0.3, 0.7, 0.9], np.float32)[GROUP], np.zeros(8, np.float32)
    for norm in ("sequence", "token", "none"):
        with_it, _ = run(gdpo(final_norm=norm), np.stack([rewards[:, 0], constant], axis=1), GROUP, MASK)
        without, _ = run(gdpo(final_norm=norm), np.stack([rewards[:, 0], other], axis=1), GROUP, MASK)
        np.testing.assert_array_equal(with_it, without)
        assert with_it.any()


@pytest.mark.parametrize("norm", ["sequence", "token", "none"])
def test_equal_rewards_are_exactly_zero(norm):
    rewards = np.broadcast_to(np.array([0.1, 0.7], np.float32), (8, 2))
    assert not run(gdpo(final_norm=norm), rewards, GROUP, MASK)[0].any()


def test_groups_that_say_nothing_are_exactly_zero():
    rewards = rewards_of(3)
    rewards[GROUP == 0] = [0.1, 0.7]
    advantage, _ = run(gdpo(), rewards, GROUP)
    assert not advantage[(GROUP == 0) | (GROUP == 1)].any() and advantage[GROUP == 3].all()
    assert gdpo().min_group_size == 2


def test_the_unit_of_a_reward_does_not_matter():
    rewards = rewards_of()
    scaled, _ = run(gdpo(epsilon=1e-9), rewards * np.array([1000.0, 0.5], np.float32), GROUP)
    np.testing.assert_allclose(scaled, run(gdpo(epsilon=1e-9), rewards, GROUP)[0], rtol=1e-5, atol=1e-6)


def test_reward_collapse():
    """(1, 0) and (0, 1) have one sum: GRPO cannot tell them apart, GDPO can if their spreads differ."""
    rewards = np.array([[1, 0], [1, 0], [0, 1], [0, 0]], np.float32)
    assert run(grpo(), rewards)[1]["reward_resolution"] == (2.0, 3.0)
    advantage, metrics = run(gdpo(), rewards)
    assert metrics["reward_resolution"] == (3.0, 3.0)
    assert advantage[2, 0] > advantage[0, 0] > 0.0  # the rarer reward weighs more
    assert run(gdpo(), CORNERS)[1]["reward_resolution"] == (3.0, 4.0)  # of equal spread: only weights help
    assert run(gdpo(reward_weights=(2.0, 1.0)), CORNERS)[1]["reward_resolution"] == (4.0, 4.0)


def test_rows_that_are_not_valid_do_not_take_part():
    rewards = rewards_of()
    valid = np.array([1, 1, 1, 0, 1, 1, 1, 0], bool)
    spoilt = np.where(valid[:, None], rewards, np.nan)
    apart = np.where(valid, GROUP, 7)  # the same rows in a group of their own, with equal rewards and no tokens
    equal = np.where(valid[:, None], rewards, np.float32(0.1))
    for norm in ("token", "none"):
        advantage, _ = run(gdpo(final_norm=norm), spoilt, GROUP, MASK, is_valid=valid)
        alone, _ = run(gdpo(final_norm=norm), equal, apart, MASK & valid[:, None])
        np.testing.assert_allclose(advantage, alone, rtol=1e-6, atol=1e-7)
    total = summed(rewards[valid], GROUP[valid], (1.0, 1.0), 1e-4)
    advantage, _ = run(gdpo(), spoilt, GROUP, is_valid=valid)
    np.testing.assert_allclose(advantage[valid, 0], total / (total.std(ddof=1) + 1e-4), rtol=1e-5, atol=1e-6)
    assert not advantage[~valid].any()


def test_a_reward_that_a_grader_did_not_give_is_of_no_statistic():
    rewards, known = rewards_of(), np.ones((8, 2), bool)
    known[0, 1] = known[1, 0] = False
    known[2] = False  # no reward at all: as if the row were not valid
    spoilt = np.where(known, rewards, np.nan)
    total = summed(np.nan_to_num(spoilt), GROUP, (1.0, 2.0), 0.01, known)
    rows = known.any(axis=1)
    expected = np.where(rows, (total - total[rows].mean()) / (total[rows].std(ddof=1) + 0.01), 0.0)
    estimator = gdpo(reward_weights=(1.0, 2.0), epsilon=0.01)
    advantage, _ = run(estimator, spoilt, GROUP, reward_is_valid=known)
    np.testing.assert_allclose(advantage[:, 0], expected, rtol=1e-5, atol=1e-6)
    whitened, _ = run(gdpo(final_norm="token"), spoilt, GROUP, reward_is_valid=known)
    assert not whitened[2].any() and whitened[[0, 1]].all()


def test_the_order_of_rows_does_not_matter():
    order, rewards = np.array([4, 2, 6, 0, 7, 5, 1, 3]), rewards_of()
    for norm in ("sequence", "token", "none"):
        shuffled, _ = run(gdpo(final_norm=norm), rewards[order], GROUP[order], MASK[order])
        np.testing.assert_allclose(shuffled, run(gdpo(final_norm=norm), rewards, GROUP, MASK)[0][order], rtol=1e-5)


@pytest.mark.parametrize("norm", ["sequence", "token", "none"])
def test_batches_of_nothing(norm):
    rewards = rewards_of()
    assert not run(gdpo(final_norm=norm), rewards, GROUP, np.zeros((8, 8), bool))[0].any()
    assert not run(gdpo(final_norm=norm), rewards * np.nan, GROUP, MASK, is_valid=np.zeros(8, bool))[0].any()
    one = np.zeros((8, 8), bool)
    one[0, 1] = True
    single, _ = run(gdpo(final_norm=norm), rewards, GROUP, one)
    assert np.isfinite(single).all() and not single[~one].any() and (norm != "token" or not single.any())


def test_one_reward_is_grpo_but_for_the_last_step():
    rewards = rewards_of()[:, :1]
    np.testing.assert_allclose(
        run(gdpo(final_norm="none"), rewards, GROUP)[0], run(grpo(epsilon=1e-4), rewards, GROUP)[0], rtol=1e-6
    )


def test_numbers_are_of_the_state():
    state = gdpo(reward_weights=(2.0, 1.0), epsilon=0.5).init()
    assert state.reward_weights.shape == (2,) and state.epsilon == 0.5
    rollouts = toy.rollouts(MASK, rewards=rewards_of(), group=GROUP)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(gdpo().estimate)(rollouts, state)[3], state)
    assert outcome.weights_state(None).ndim == gdpo().init().reward_weights.ndim == 0
    with pytest.raises(ValueError, match="reward_weights has 3 numbers for 2 reward columns"):
        gdpo(reward_weights=(1.0, 1.0, 1.0)).estimate(rollouts, gdpo(reward_weights=(1.0, 1.0, 1.0)).init())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon must be above 0, got 0\.0"),
        ({"epsilon": float("nan")}, "epsilon must be above 0, got nan"),
        ({"final_norm": "batch"}, "final_norm must be sequence, token or none, got 'batch'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        gdpo(**options)

"""QAE by hand, against a loop over exact fractions, and its theorem."""

from fractions import Fraction
from math import ceil, floor

import jax
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy.advantages.qae import qae

GROUP = np.array([3, 0, 3, 0, 3, 1, 3])
REWARDS = np.array([1.0, 0.1, 0.0, 0.1, 0.5, 2.0, 0.25], np.float32)
MASK = np.tril(np.ones((7, 7), bool))
RULES = ("paper", "linear", "lower")


def run(estimator, rewards=REWARDS, group=GROUP, mask=None, **row_data):
    mask = np.ones((len(rewards), 2), bool) if mask is None else mask
    return toy.estimate(estimator, toy.rollouts(mask, rewards=rewards, group=group, row_data=row_data))


def exact_quantile(rewards, k, rule):
    """Of the rewards of one group, with K an exact fraction."""
    x = np.sort(np.asarray(rewards, np.float64))
    if rule == "paper":
        return x[ceil(k * len(x)) - 1]
    position = k * (len(x) - 1)
    low, high = x[floor(position)], x[ceil(position)]
    return low if rule == "lower" else low + float(position - floor(position)) * (high - low)


@pytest.mark.parametrize(
    ("rule", "k", "baseline"),
    [
        ("paper", 0.25, 0.0),  # of 0, .25, .5, 1 the first
        ("paper", 0.26, 0.25),
        ("paper", 0.5, 0.25),
        ("paper", 0.99, 1.0),
        ("lower", 0.5, 0.25),  # position 1.5
        ("linear", 0.5, 0.375),
        ("linear", 0.8, 0.7),  # position 2.4
    ],
)
def test_graded_rewards_by_hand(rule, k, baseline):
    advantage, metrics = run(qae(quantile_k=k, baseline=rule), mask=MASK)
    expected = np.where(GROUP == 3, REWARDS - baseline, 0.0)
    np.testing.assert_allclose(advantage, np.where(MASK, expected[:, None], 0.0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(metrics["qae/baseline"], (4 * baseline + 0.1 + 0.1 + 2.0, 7.0), rtol=1e-6)
    assert metrics["qae/zero_advantage_fraction"] == ((expected == 0.0).sum(), 7.0)


def test_two_regimes_of_binary_rewards_by_hand():
    rewards = np.array([1, 0, 0, 0, 0, 1, 1, 1, 1, 0], np.float32)
    advantage, _ = run(qae(), rewards, np.repeat([0, 1], 5))
    np.testing.assert_array_equal(advantage[:, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, -1])


@pytest.mark.parametrize("k", [0.1, 0.2, 0.29, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_the_sides_of_one_minus_k_are_counted(k):
    """All success rates of up to 20 rows; in floats 1 - .9 is below .1, so 1 of 10 would count as easy."""
    sizes = [(size, successes) for size in range(2, 21) for successes in range(size + 1)]
    rewards = np.concatenate([np.arange(size) < successes for size, successes in sizes]).astype(np.float32)
    group = np.repeat(np.arange(len(sizes)), [size for size, _ in sizes])
    order = np.random.default_rng(0).permutation(len(group))
    advantage = run(qae(quantile_k=k), rewards[order], group[order])[0][:, 0]
    exact = Fraction(str(k))
    easy = np.array([Fraction(successes, size) > 1 - exact for size, successes in sizes])[group[order]]
    np.testing.assert_array_equal(advantage, rewards[order] - easy)


@st.composite
def batches(draw):
    """Rewards with ties, ragged groups and rows that are not valid."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    valid = rng.random(12) < draw(st.sampled_from([0.5, 0.9, 1.0]))
    values = draw(st.sampled_from([(0.0, 1.0), (-1.0, 0.1, 0.1, 3.0), tuple(rng.normal(size=8))]))
    rewards = np.where(valid, rng.choice(values, 12), np.nan).astype(np.float32)
    group = rng.choice(draw(st.sampled_from([[2], [0, 5, 11], [0, 1, 2, 3, 4, 5]])), 12)
    return rewards, group.astype(np.int32), valid


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(batch=batches(), k=st.sampled_from(["0.01", "0.2", "0.25", "0.4", "0.5", "0.625", "0.9"]))
def test_against_a_loop(rule, batch, k):
    rewards, group, valid = batch
    advantage, _ = run(qae(quantile_k=float(k), baseline=rule), rewards, group, is_valid=valid)
    for i in range(12):
        inside = rewards[(group == group[i]) & valid]
        expected = rewards[i] - exact_quantile(inside, Fraction(k), rule) if valid[i] else 0.0
        np.testing.assert_allclose(advantage[i], np.full(2, expected), rtol=1e-5, atol=1e-6)


def entropy_changes(policy, reward, baselines):
    """-Cov(log π, π (R - b)) under π `[N, V]`, for baselines `[M]`: `[N, M]`."""
    x = np.log(policy)[:, :, None]
    y = policy[:, :, None] * (reward[:, :, None] - baselines)
    weight = policy[:, :, None]
    return -((weight * x * y).sum(1) - (weight * x).sum(1) * (weight * y).sum(1))


@pytest.mark.parametrize("k", [0.2, 0.4, 0.5, 0.8])
def test_theorem_1(k):
    """2000 policies with 0/1 rewards: b_K makes the entropy fall most on hard groups and least on easy ones."""
    rng, num, size = np.random.default_rng(1), 500, 8
    policy = np.exp(rng.normal(size=(num, 6)) * rng.uniform(0.1, 4.0, (num, 1)))
    policy /= policy.sum(1, keepdims=True)
    reward = rng.integers(0, 2, (num, 6)).astype(np.float64)
    sampled = np.array([rng.choice(r, size, p=p) for p, r in zip(policy, reward)]).astype(np.float32)
    advantage, _ = run(qae(quantile_k=k), sampled.reshape(-1), np.repeat(np.arange(num), size))
    chosen = sampled[:, 0] - advantage[::size, 0]
    easy = np.array([int(successes) > size - ceil(Fraction(str(k)) * size) for successes in sampled.sum(1)])
    np.testing.assert_array_equal(chosen, easy)
    grid = np.linspace(0.0, 1.0, 11)
    change = entropy_changes(policy, reward, grid)
    ours = change[np.arange(num), np.where(easy, 10, 0)]
    assert (ours[~easy, None] <= change[~easy] + 1e-14).all() and (ours[easy, None] >= change[easy] - 1e-14).all()
    assert 100 < easy.sum() < 400 and (change[:, 10] - change[:, 0]).min() > 1e-6, "the two ends differ"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", ["none", "group"])
def test_equal_rewards_and_single_rows_are_exactly_zero(rule, scale):
    rewards = np.array([0.1, 0.1, 0.1, 0.7, 0.3, 0.3, 0.3], np.float32)
    advantage, metrics = run(
        qae(baseline=rule, scale_rewards=scale, quantile_k=0.37), rewards, np.array([2, 2, 2, 0, 1, 1, 1])
    )
    assert not advantage.any()
    assert metrics["qae/zero_advantage_fraction"] == (7.0, 7.0)
    assert qae().min_group_size == 2


def test_scaled_by_the_standard_deviation():
    plain, scaled = run(qae())[0], run(qae(scale_rewards="group", epsilon=0.01))[0]
    std = np.std([1.0, 0.0, 0.5, 0.25], ddof=1)
    np.testing.assert_allclose(scaled[GROUP == 3], plain[GROUP == 3] / (std + 0.01), rtol=1e-6)


def test_the_order_of_rows_does_not_matter():
    order = np.array([4, 2, 6, 0, 5, 1, 3])
    for rule in RULES:
        estimator = qae(baseline=rule, scale_rewards="group")
        shuffled, _ = run(estimator, REWARDS[order], GROUP[order])
        np.testing.assert_allclose(shuffled, run(estimator)[0][order], rtol=1e-6)


def test_a_batch_without_valid_rows_or_tokens():
    rewards = np.full(7, np.nan, np.float32)
    advantage, metrics = run(qae(baseline="linear"), rewards, is_valid=np.zeros(7, bool))
    assert not advantage.any() and metrics["qae/baseline"] == metrics["qae/zero_advantage_fraction"] == (0.0, 0.0)
    assert not run(qae(), mask=np.zeros((7, 3), bool))[0].any()


def test_a_response_without_tokens_is_of_its_group():
    mask = np.ones((7, 2), bool)
    mask[2] = False  # reward 0, the lowest of its group
    advantage, _ = run(qae(quantile_k=0.25), mask=mask)
    np.testing.assert_allclose(advantage[0], [1.0, 1.0])


def test_columns_are_weighted_and_summed():
    columns = np.stack([REWARDS, np.full_like(REWARDS, 7.0)], axis=1)
    estimator = qae(reward_weights=(2.0, 0.0))
    np.testing.assert_allclose(run(estimator, columns)[0], 2.0 * run(qae())[0], rtol=1e-6)
    with pytest.raises(ValueError, match="reward_weights has 2 numbers for 1 reward columns"):
        estimator.estimate(toy.rollouts(MASK), estimator.init())


def test_the_state_returns_unchanged():
    state = qae(quantile_k=0.25, epsilon=0.5).init()
    assert (int(state.quantile_k.numerator), int(state.quantile_k.denominator)) == (1, 4)
    after = jax.jit(qae().estimate)(toy.rollouts(MASK, rewards=REWARDS, group=GROUP), state)[3]
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile_k": 0.0}, r"quantile_k must be in \(0, 1\), got 0\.0"),
        ({"quantile_k": 1.0}, r"quantile_k must be in \(0, 1\), got 1\.0"),
        ({"quantile_k": float("nan")}, r"quantile_k must be in \(0, 1\), got nan"),
        ({"baseline": "higher"}, "baseline must be paper, linear or lower, got 'higher'"),
        ({"scale_rewards": "batch"}, "scale_rewards must be none or group, got 'batch'"),
        ({"epsilon": 0.0}, r"epsilon must be above 0, got 0\.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        qae(**options)

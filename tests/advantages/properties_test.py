"""Properties of estimators that compare rewards: equal rewards, shifts, scales, the order of rows."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import toy

from jentropy.advantages.grpo import grpo
from jentropy.advantages.opo import opo
from jentropy.advantages.raft import raft, reinforce_rej
from jentropy.advantages.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from jentropy.advantages.remax import remax
from jentropy.advantages.rloo import rloo

ROWS, COLUMNS = 8, 5
SMALL = 1e-30

COMPARE = {
    "rloo": rloo(),
    "opo": opo(),
    "grpo": grpo(epsilon=SMALL),
    "grpo/batch": grpo(epsilon=SMALL, scale_rewards="batch"),
    "grpo/none": grpo(scale_rewards="none"),
    "reinforce_pp_baseline": reinforce_pp_baseline(),
    "reinforce_pp_baseline/drop": reinforce_pp_baseline(drop_degenerate=True),
    "reinforce_pp_baseline/sequence": reinforce_pp_baseline(whiten_unit="sequence"),
}
"""Rewards count only against those of their group, and in `grpo/batch` for one scale."""

WHITENED = {"reinforce_pp": reinforce_pp(), "reinforce_pp/sequence": reinforce_pp(whiten_unit="sequence")}
STANDARDISED = {name: e for name, e in COMPARE.items() if name.startswith(("grpo", "reinforce_pp"))} | WHITENED
del STANDARDISED["grpo/none"]
LINEAR = {"rloo": rloo(), "opo": opo(), "grpo/none": grpo(scale_rewards="none"), "remax": remax()}
ZERO_IN_EQUAL_GROUPS = {n: e for n, e in COMPARE.items() if not n.startswith("reinforce_pp") or n.endswith("drop")} | {
    "reinforce_rej": reinforce_rej()
}
ALL = COMPARE | WHITENED | {"remax": remax(), "raft": raft(), "reinforce_rej": reinforce_rej()}


@st.composite
def batches(draw):
    """Rewards that are multiples of 1/4, groups of any size, ragged rows, some of them without a token."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rewards = rng.integers(-draw(st.integers(0, 8)), 8, ROWS).astype(np.float32) / 4
    group = rng.integers(0, draw(st.integers(1, ROWS)), ROWS)
    mask = np.arange(COLUMNS)[None, :] < rng.integers(0, COLUMNS + 1, ROWS)[:, None]
    return rewards, group, mask, rng


def run(estimator, rewards, group, mask):
    greedy = rewards[::-1] / 2  # any number will do; it scales with the rewards
    rollouts = toy.rollouts(mask, rewards=rewards, group=group, row_data={"greedy_reward": greedy})
    return toy.estimate(estimator, rollouts)[0]


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


property_test = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", ZERO_IN_EQUAL_GROUPS)
@property_test
@hypothesis.given(batches(), st.sampled_from([0.1, -0.7, 1.0, 1e6 + 0.1, 3e-9]))
def test_groups_of_equal_rewards_are_exactly_zero(name, batch, value):
    rewards, group, mask, _ = batch
    rewards = np.where(group == group[0], np.float32(value), rewards)
    assert not run(ZERO_IN_EQUAL_GROUPS[name], rewards, group, mask)[group == group[0]].any()


@pytest.mark.parametrize("name", COMPARE | WHITENED)
@property_test
@hypothesis.given(batches(), st.sampled_from([-2.0, 0.25, 8.0]))
def test_a_constant_added_to_all_rewards_changes_nothing(name, batch, shift):
    rewards, group, mask, _ = batch
    estimator = (COMPARE | WHITENED)[name]
    close(run(estimator, rewards + np.float32(shift), group, mask), run(estimator, rewards, group, mask))


@pytest.mark.parametrize("name", sorted(COMPARE.keys() - {"grpo/batch"}))
@property_test
@hypothesis.given(batches())
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(name, batch):
    rewards, group, mask, rng = batch
    shift = rng.integers(-8, 8, ROWS).astype(np.float32)[group] / 4
    close(run(COMPARE[name], rewards + shift, group, mask), run(COMPARE[name], rewards, group, mask))


@pytest.mark.parametrize("name", STANDARDISED)
@property_test
@hypothesis.given(batches(), st.sampled_from([0.5, 3.0, 100.0]))
def test_the_scale_of_standardised_rewards_does_not_matter(name, batch, factor):
    rewards, group, mask, _ = batch
    close(
        run(STANDARDISED[name], rewards * np.float32(factor), group, mask),
        run(STANDARDISED[name], rewards, group, mask),
    )


@pytest.mark.parametrize("name", LINEAR)
@property_test
@hypothesis.given(batches(), st.sampled_from([0.5, 4.0]))
def test_other_advantages_scale_with_the_rewards(name, batch, factor):
    rewards, group, mask, _ = batch
    factor = np.float32(factor)
    close(run(LINEAR[name], rewards * factor, group, mask), factor * run(LINEAR[name], rewards, group, mask))


@pytest.mark.parametrize("name", ALL)
@property_test
@hypothesis.given(batches())
def test_rows_in_another_order_have_the_same_advantages(name, batch):
    rewards, group, mask, rng = batch
    rewards = np.sign(rewards) if name in ("raft", "reinforce_rej") else rewards
    order = rng.permutation(ROWS)
    rows = toy.rollouts(mask, rewards=rewards, group=group, row_data={"greedy_reward": rewards / 2})
    moved = toy.rollouts(
        mask[order], rewards=rewards[order], group=group[order], row_data={"greedy_reward": rewards[order] / 2}
    )
    close(toy.estimate(ALL[name], moved)[0], toy.estimate(ALL[name], rows)[0][order])


@pytest.mark.parametrize("name", ("rloo", "grpo/none", "grpo"))
@property_test
@hypothesis.given(batches())
def test_the_advantages_of_a_group_add_up_to_nothing(name, batch):
    rewards, group, _, _ = batch
    advantage = run(COMPARE[name], rewards, group, np.ones((ROWS, COLUMNS), bool))[:, 0]
    for g in np.unique(group):
        assert abs(advantage[group == g].sum()) < 1e-5

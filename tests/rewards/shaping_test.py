"""Overlong responses: the penalty by hand, its reward column, rows without gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import estimate, loss_and_gradient, rollouts, signals, update

from jentropy import normalisers, surrogates
from jentropy.advantages.grpo import grpo
from jentropy.base import initial_plan
from jentropy.compose import chain
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.rewards.base import DeviceReward
from jentropy.rewards.shaping import mask_truncated, overlong_penalty, overlong_reward


def penalty(*length, **options):
    options = {"max_length": 10, "buffer_length": 4} | options
    return overlong_penalty(jnp.asarray(length, jnp.int32), **options)


def test_nothing_then_a_line_then_the_floor():
    found = penalty(0, 1, 6, 7, 8, 9, 10, 11, 1000)
    np.testing.assert_array_equal(found, np.float32([0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]))
    assert not np.signbit(np.asarray(found[:3])).any()


def test_without_the_floor_the_line_goes_on():
    np.testing.assert_array_equal(penalty(6, 8, 10, 11, 16, floor=False), np.float32([0, -0.5, -1, -1.25, -2.5]))


def test_the_factor_scales_all_of_it():
    np.testing.assert_array_equal(penalty(6, 8, 10, 99, penalty_factor=0.5), np.float32([0, -0.25, -0.5, -0.5]))
    np.testing.assert_array_equal(penalty(8, 14, penalty_factor=3.0, floor=False), np.float32([-1.5, -6]))
    np.testing.assert_array_equal(penalty(8, 99, penalty_factor=0.0), np.float32([0, 0]))


def test_the_settings_of_the_paper():
    found = penalty(16384, 16385, 18432, 20480, max_length=20480, buffer_length=4096)
    np.testing.assert_array_equal(found, np.float32([0, -1 / 4096, -0.5, -1]))


def test_the_buffer_may_be_one_token_or_everything():
    np.testing.assert_array_equal(penalty(9, 10, buffer_length=1), np.float32([0, -1]))
    np.testing.assert_array_equal(penalty(0, 5, 10, buffer_length=10), np.float32([0, -0.5, -1]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    longest=st.integers(1, 50_000), share=st.floats(0, 1), factor=st.floats(0, 100), more=st.integers(0, 100_000),
    length=st.integers(0, 100_000),
)  # fmt: skip
def test_longer_is_never_better_and_the_floor_holds(longest, share, factor, more, length):
    options = {"max_length": longest, "buffer_length": max(1, round(share * longest)), "penalty_factor": factor}
    short, long = np.asarray(penalty(length, length + more, **options))
    assert -np.float32(factor) <= long <= short <= 0
    line = np.asarray(penalty(length, length + more, floor=False, **options))
    assert line[1] <= line[0] <= 0 and line[0] <= short
    if length + more <= longest:
        np.testing.assert_allclose(line, [short, long], rtol=1e-6)


NUMBERS = [
    ("max_length", 0, r"max_length must be at least 1 token, got 0"),
    ("{buffer}", 0, r"{buffer} must be in \(0, max_length = 10\] tokens, got 0"),
    ("{buffer}", 11, r"{buffer} must be in \(0, max_length = 10\] tokens, got 11"),
    ("{factor}", -0.5, r"{factor} must be finite and at least 0, got -0.5"),
    ("{factor}", float("nan"), r"{factor} must be finite and at least 0, got nan"),
    ("{factor}", float("inf"), r"{factor} must be finite and at least 0, got inf"),
]


@pytest.mark.parametrize(("name", "value", "message"), NUMBERS)
def test_numbers_out_of_range_are_named(name, value, message):
    for make, buffer, factor in (
        (lambda **options: penalty(1, **options), "buffer_length", "penalty_factor"),
        (overlong_reward, "overlong_buffer_length", "overlong_buffer_penalty"),
    ):
        options = {"max_length": 10, buffer: 4} | {name.format(buffer=buffer, factor=factor): value}
        with pytest.raises(ValueError, match=message.replace("{buffer}", buffer).replace("{factor}", factor)):
            make(**options)


def test_lengths_are_integers():
    with pytest.raises(AssertionError):
        overlong_penalty(jnp.zeros(2), max_length=10, buffer_length=4)


MASK = np.arange(12)[None, :] < np.array([2, 8, 10, 12])[:, None]


def test_the_reward_counts_the_tokens_of_the_response():
    """Not its characters, nor the columns of prompt and padding."""
    reward = overlong_reward(max_length=10, overlong_buffer_length=4)
    moved = np.roll(np.pad(MASK, ((0, 0), (3, 3))), -1, axis=1)
    for mask in (MASK, moved):
        tokens = jnp.full(mask.shape, 7, jnp.int32)
        found = jax.jit(reward.function)(tokens, jnp.asarray(mask), {"answer": jnp.zeros(4, jnp.int32)})
        np.testing.assert_array_equal(found, np.float32([0, -0.5, -1, -1]))
        assert found.dtype == np.float32
    assert isinstance(reward, DeviceReward) and (reward.name, reward.weight) == ("overlong", 1.0)


def test_the_reward_has_its_factor():
    reward = overlong_reward(max_length=10, overlong_buffer_length=4, overlong_buffer_penalty=0.2)
    found = reward.function(jnp.zeros(MASK.shape, jnp.int32), jnp.asarray(MASK), {})
    np.testing.assert_allclose(found, [0, -0.1, -0.2, -0.2], rtol=1e-6)


def test_equal_settings_share_one_program():
    one, other = (overlong_reward(max_length=10, overlong_buffer_length=4) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != overlong_reward(max_length=10, overlong_buffer_length=5)


def test_the_column_enters_before_group_statistics():
    """All answers are right, so plain GRPO learns nothing; with the column the longer half is worse."""
    reward = overlong_reward(max_length=10, overlong_buffer_length=4)
    batch = rollouts(MASK, rewards=np.ones((4, 1), np.float32))
    assert not estimate(grpo(), batch)[0].any()
    column = reward.function(batch.tokens, batch.loss_mask, {})
    shaped = batch.replace(rewards=jnp.concatenate([batch.rewards, column[:, None]], axis=1))
    advantage = estimate(grpo(epsilon=1e-4), shaped)[0]
    total = np.array([1.0, 0.5, 0.0, 0.0])
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(advantage, np.where(MASK, expected[:, None], 0), rtol=1e-5)


TRUNCATED = np.array([False, False, False, True])


def truncated_batch(tokens_of_last=12):
    mask = np.arange(12)[None, :] < np.array([2, 8, 10, tokens_of_last])[:, None]
    rewards = np.float32([1, 0, 0, 1])
    return rollouts(mask, rewards=rewards, row_data={"truncated": TRUNCATED, "is_valid": np.ones(4, bool)})


def test_a_truncated_row_has_no_token_left_and_all_else_is_kept():
    batch = truncated_batch()
    masked = jax.jit(mask_truncated)(batch)
    np.testing.assert_array_equal(masked.loss_mask, np.asarray(batch.loss_mask) & ~TRUNCATED[:, None])
    row_data = dict(masked.row_data)
    np.testing.assert_array_equal(row_data.pop("response_length"), [2, 8, 10, 12])
    kept = masked.replace(loss_mask=batch.loss_mask, row_data=row_data)
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_reward_of_a_truncated_row_stays_in_the_baseline():
    advantage = estimate(grpo(epsilon=1e-4), mask_truncated(truncated_batch()))[0]
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    expected = (rewards - 0.5) / (rewards.std(ddof=1) + 1e-4)
    expected = np.where(MASK & ~TRUNCATED[:, None], expected[:, None], 0)
    np.testing.assert_allclose(advantage, expected, rtol=1e-5)
    alone = np.array([1.0, 0.0, 0.0])
    assert abs(advantage[0, 0] - (1 - alone.mean()) / alone.std(ddof=1)) > 0.2


def test_a_truncated_row_enters_no_count_and_no_statistic():
    """Loss, gradient and the selection of tokens are those of a row without tokens, whatever the row holds."""
    found = []
    for batch, fill in ((mask_truncated(truncated_batch()), -9.0), (truncated_batch(tokens_of_last=0), 0.0)):
        rng = np.random.default_rng(0)
        log_prob, entropy = -rng.exponential(size=(2, 4, 12)).astype(np.float32)
        log_prob[3], entropy[3] = fill, fill
        scored = signals(batch, log_prob=log_prob, entropy=-entropy)
        advantage = jnp.asarray(estimate(grpo(), batch)[0])
        mechanism = chain(
            clip_cov=clip_cov(clip_cov_ratio=0.2, clip_cov_lb=-5.0, clip_cov_ub=5.0),
            bonus=entropy_bonus(entropy_coef=0.1),
        )
        plan = update(mechanism, scored, advantage, plan=initial_plan(batch, advantage))
        assert not np.asarray(plan.pg_weight)[3].any() and not np.asarray(plan.counted)[3].any()
        found.append(loss_and_gradient(
            plan, scored, surrogate=surrogates.ratio, normaliser=normalisers.token_mean,
            terms=mechanism.terms,
        ))  # fmt: skip
    (loss, gradient, _), (other_loss, other_gradient, _) = found
    np.testing.assert_array_equal(loss, other_loss)
    np.testing.assert_array_equal(gradient[:3], other_gradient[:3])
    assert np.isfinite(loss) and np.isfinite(gradient[:3]).all() and gradient[:3].any()


def test_rows_must_say_what_was_truncated():
    with pytest.raises(ValueError, match=r"mask_truncated needs row_data\['truncated'\]"):
        mask_truncated(rollouts(MASK))

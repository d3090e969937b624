"""VinePPO by hand, on states without a value, tokens without a step, and against the released code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from golden_cases import DOUBLE, close, make_test

from jentropy.advantages.vine import step_advantages, vine

MASK = np.array(
    [
        [0, 0, 1, 1, 1, 1, 1, 0],  # steps 0 0 1 2 and the end of the response
        [0, 1, 1, 1, 1, 1, 1, 1],  # a hole below: two tokens of another author in step 1
        [0, 1, 1, 1, 0, 0, 0, 0],  # no step at all
        [0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)
MASK[1, 3:5] = False
STEP = np.array(
    [
        [7, 7, 0, 0, 1, 2, -1, 7],
        [7, 0, 0, 1, 1, 1, 2, 3],
        [7, -1, -1, -1, 7, 7, 7, 7],
        [7, 7, 7, 7, 7, 7, 7, 7],
    ],
    np.int32,
)  # what stands outside the mask has no influence
REWARDS = np.array([1.0, 0.0, 1.0, 1.0], np.float32)
VALUE = np.array(
    [[0.5, 0.25, 0.75, 9.0, 9.0], [0.5, np.nan, 0.25, np.nan, 9.0], [0.25, 9.0, 9.0, 9.0, 9.0], [9.0] * 5], np.float32
)
KNOWN = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
STEPS = np.array([[-0.25, 0.5, 0.25, 0.0], [-0.25, 0.0, -0.25, 0.0], [0.75, 0.0, 0.0, 0.0], [0.0] * 4])
TOKENS = np.array(
    [
        [0, 0, -0.25, -0.25, 0.5, 0.25, 0.25, 0],
        [0, -0.25, -0.25, 0, 0, 0, -0.25, 0.0],
        [0, 0.75, 0.75, 0.75, 0, 0, 0, 0],
        [0] * 8,
    ]
)


def rollouts(mask=MASK, rewards=REWARDS, step_id=STEP, value=VALUE, known=KNOWN, **row_data):
    row_data = {"step_id": step_id, "prefix_value": value, "prefix_known": known, **row_data}
    return toy.rollouts(mask, rewards=rewards, row_data=row_data)


def run(estimator, **changes):
    return toy.estimate(estimator, rollouts(**changes))


def test_steps_by_hand():
    reward = np.zeros((4, 4), np.float32)
    reward[0, 2], reward[2, 0] = 1.0, 1.0
    args = (reward, VALUE, KNOWN, np.array([3, 4, 1, 0], np.int32))
    np.testing.assert_array_equal(step_advantages(*map(jnp.asarray, args)), STEPS)


def test_tokens_by_hand():
    advantage, metrics = run(vine(whiten=False))
    np.testing.assert_array_equal(advantage, TOKENS)
    assert metrics["vine/frac_known"] == (3 + 2 + 1, 3 + 4 + 1)
    assert metrics["error/step_id has no prefix_value"][0] == 0.0


def test_whitening_is_over_the_tokens_of_the_batch():
    x = TOKENS[MASK]
    wanted = np.zeros(MASK.shape)
    wanted[MASK] = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(run(vine())[0], wanted, rtol=2e-6, atol=1e-7)


def test_without_any_sampled_value_there_is_no_advantage():
    for estimator in (vine(), vine(whiten=False)):
        assert not run(estimator, value=np.full_like(VALUE, np.nan), known=np.zeros_like(KNOWN))[0].any()


def test_one_token_has_nothing_to_be_compared_with():
    mask = np.zeros_like(MASK)
    mask[2, 1] = True
    assert not run(vine(), mask=mask)[0].any()
    assert run(vine(whiten=False), mask=mask)[0].sum() == 0.75


def test_rows_that_are_not_valid_do_not_take_part():
    valid = np.array([True, False, True, True])
    rewards = np.where(valid, REWARDS, np.nan).astype(np.float32)
    found = run(vine(whiten=False), rewards=rewards, is_valid=valid)[0]
    np.testing.assert_array_equal(found, np.where(valid[:, None], TOKENS, 0.0))
    x = TOKENS[valid][MASK[valid]]
    whitened = run(vine(), rewards=rewards, is_valid=valid)[0]
    np.testing.assert_allclose(whitened[0, 4], (0.5 - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8), rtol=2e-6)


def test_the_order_of_rows_does_not_matter():
    order = np.array([2, 0, 3, 1])
    found = run(
        vine(), mask=MASK[order], rewards=REWARDS[order], step_id=STEP[order], value=VALUE[order], known=KNOWN[order]
    )[0]
    np.testing.assert_allclose(found, run(vine())[0][order], rtol=1e-6)


def test_reward_weights():
    columns = np.stack([REWARDS, np.full_like(REWARDS, 7.0)], axis=1)
    found = run(vine(whiten=False, reward_weights=(1.0, 0.0)), rewards=columns)[0]
    np.testing.assert_array_equal(found, TOKENS)


def test_a_step_that_the_values_do_not_reach_is_reported():
    metrics = run(vine(), value=VALUE[:, :4], known=KNOWN[:, :4])[1]
    assert metrics["error/step_id has no prefix_value"][0] == 1.0  # row 1 has four steps, and there are three


@pytest.mark.parametrize("name", ["step_id", "prefix_value", "prefix_known"])
def test_what_the_rows_must_hold(name):
    rows = rollouts()
    rows = rows.replace(row_data={k: v for k, v in rows.row_data.items() if k != name})
    with pytest.raises(ValueError, match=rf"vine needs row_data\['{name}'\], got \["):
        vine().estimate(rows, vine().init())
    assert name in vine().requires


def test_values_of_no_step_are_refused():
    with pytest.raises(ValueError, match=r"prefix_value must be \[B, S \+ 1\] with S at least 1, got \(4, 1\)"):
        run(vine(), value=VALUE[:, :1], known=KNOWN[:, :1])


def check_vine(golden, precision):
    """`base_vineppo_*`: one response; the token that ends it has no step of its own. Steps before the last may earn."""
    del precision
    values, reward, length = golden["values"], golden["step_rewards"], golden["step_lengths"].astype(int)
    sampled = ~np.isnan(golden["mc_rollout_rewards"]).all(axis=1) & ~np.isnan(values)
    close(np.nanmean(golden["mc_rollout_rewards"][sampled], axis=1), values[sampled], 1e-12)
    known, num_steps = ~np.isnan(values), len(reward)
    found = step_advantages(
        jnp.asarray(reward[None]),
        jnp.asarray(values[None]),
        jnp.asarray(known[None]),
        jnp.asarray([num_steps], jnp.int32),
    )
    close(found[0], golden["step_advantages"], 1e-12)
    filled = known[:-1] | (golden["step_advantages"] == 0.0)
    assert filled.all() and not np.asarray(found)[0][~known[:-1]].any()
    step_id = np.repeat(np.arange(num_steps), length)
    step_id = np.append(step_id, [-1] * (len(golden["token_advantages"]) - len(step_id))).astype(np.int32)[None]
    assert step_id.shape[1] - length.sum() == bool(golden["has_eos"])
    if reward[:-1].any():  # the estimator has outcome rewards only
        return
    rows = toy.rollouts(
        np.ones(step_id.shape, bool),
        rewards=reward[-1:],
        row_data={"step_id": step_id, "prefix_value": values[None], "prefix_known": known[None]},
    )
    estimator = vine(whiten=False)
    close(jax.jit(estimator.estimate)(rows, estimator.init())[0][0], golden["token_advantages"], 1e-12)


test_released_code = make_test({"base_vineppo_*": (check_vine, DOUBLE)})

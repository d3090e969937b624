"""FR3E by hand, on states of equal rewards, without forks, and against the released code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from golden_cases import DOUBLE, FLOAT32_SCALAR, close, make_test

from jentropy.advantages.fr3e import fr3e
from jentropy.advantages.grpo import grpo

# Two states along the trajectory of row 0, whose prompt has rows 0 and 1; another prompt has rows 6 and 7.
PARENT, FORK = np.array([-1, -1, 0, 0, 0, 0, -1, -1]), np.array([2, 2, 3, 3, 4, 4, 2, 2])
GROUP = np.array([4, 4, 1, 1, 0, 0, 2, 2])
REWARDS = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.0, 1.0], np.float32)
MASK = np.arange(6)[None, :] >= FORK[:, None]
GAIN = np.array([0.5, 0.5, 0.5, 0.5, -0.75, -0.75, 0.5, 0.5])
CENTRED = np.array([0.5, -0.5, 0.0, 0.0, -0.25, 0.25, -0.5, 0.5])


def rollouts(rewards=REWARDS, mask=MASK, parent=PARENT, fork=FORK, group=GROUP, row_id=None, **row_data):
    rows = toy.rollouts(mask, rewards=rewards, group=group, row_id=row_id, row_data=row_data)
    return rows.replace(parent=jnp.asarray(parent, jnp.int32), fork=jnp.asarray(fork, jnp.int32))


def run(estimator, rows=None):
    return toy.estimate(estimator, rollouts() if rows is None else rows)


def per_row(estimator, rows=None):
    return run(estimator, rows)[0][:, -1]


def test_by_hand():
    advantage, metrics = run(fr3e())
    expected = CENTRED * np.exp(-GAIN)
    np.testing.assert_allclose(advantage, np.where(MASK, expected[:, None], 0.0), rtol=1e-6)
    total, count = metrics["fr3e/value_gain"]
    assert (total, count) == (0.5 + 0.5 - 0.75 + 0.5, 4.0)
    np.testing.assert_allclose(metrics["fr3e/alpha"][0], 3 * np.exp(-0.5) + np.exp(0.75), rtol=1e-6)


def test_the_gain_of_a_prompt():
    roots = PARENT < 0
    own = per_row(fr3e(v0="own"))
    np.testing.assert_allclose(own, CENTRED * np.where(roots, 1.0, np.exp(-GAIN)), rtol=1e-6)
    complement = per_row(fr3e(v0="complement"), rollouts(REWARDS * np.float32(0.5)))
    gain = np.where(roots, 1.0 - 0.25, GAIN / 2)
    np.testing.assert_allclose(complement, CENTRED / 2 * np.exp(-gain), rtol=1e-6)


def test_the_fraction_of_positive_advantages_gives_a_solved_state_nothing():
    gain = np.array([0.5, 0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5])  # of V = .5, 0, .5 and, of the other prompt, .5
    np.testing.assert_allclose(per_row(fr3e(value="positive_fraction")), CENTRED * np.exp(-gain), rtol=1e-6)


def test_sharpened_gains_add_up_to_one_in_a_tree():
    p = 1.5
    total = 0.5**p + 0.5**p + 0.75**p
    gain = np.sign(GAIN) * np.abs(GAIN) ** p / np.where(GROUP == 2, 0.5**p, total)
    np.testing.assert_allclose(per_row(fr3e(sharpen=p)), CENTRED * np.exp(-gain), rtol=1e-6)


def test_sharpening_without_any_gain_is_no_modulation():
    rewards = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0], np.float32)
    found = per_row(fr3e(sharpen=1.5, v0="own"), rollouts(rewards))
    np.testing.assert_array_equal(found, rewards - 0.5)


def test_other_modulations():
    found = per_row(fr3e(alpha_fn=_one_minus))
    np.testing.assert_allclose(found, CENTRED * (1.0 - GAIN), rtol=1e-6)


def _one_minus(gain):
    return 1.0 - gain


@pytest.mark.parametrize("scale", ["none", "group"])
def test_a_state_of_equal_rewards_is_exactly_zero(scale):
    rewards, group = np.full(8, 0.1, np.float32), np.array([4, 4, 1, 1, 1, 2, 2, 2])  # a mean of three rounds
    rows = rollouts(rewards, fork=np.array([2, 2, 3, 3, 3, 2, 2, 2]), parent=np.array([-1, -1, 0, 0, 0, -1, -1, -1]))
    assert not per_row(fr3e(scale_rewards=scale), rows.replace(group=jnp.asarray(group, jnp.int32))).any()


def test_without_forks_it_is_grpo_without_a_standard_deviation():
    rows = rollouts(parent=np.full(8, -1))
    np.testing.assert_array_equal(run(fr3e(v0="own"), rows)[0], run(grpo(scale_rewards="none"), rows)[0])
    scaled = run(fr3e(v0="own", scale_rewards="group", epsilon=1e-3), rows)[0]
    np.testing.assert_allclose(scaled, run(grpo(epsilon=1e-3), rows)[0], rtol=1e-6)


def test_the_order_of_rows_and_rows_that_are_not_valid():
    order = np.array([7, 2, 9, 5, 0, 3, 8, 1, 6, 4])
    extra = [np.append(x, [y, y]) for x, y in ((PARENT, 0), (FORK, 3), (GROUP, 1))]
    valid = np.arange(10) < 8
    rows = rollouts(
        np.append(REWARDS, [np.nan, 7.0])[order].astype(np.float32),
        np.concatenate([MASK, MASK[:2]])[order],
        *(x[order] for x in extra),
        row_id=np.arange(10)[order],
        is_valid=valid[order],
    )
    found, wanted = run(fr3e(sharpen=1.5), rows)[0], run(fr3e(sharpen=1.5))[0]
    np.testing.assert_allclose(found, np.concatenate([wanted, np.zeros((2, 6))])[order], rtol=1e-6)


def test_a_state_whose_predecessor_is_not_known_is_not_modulated():
    valid = np.array([False, False, True, True, True, True, True, True])
    rewards = np.array([0, 0, 1.0, 0.0, 0.0, 0.5, 0.0, 1.0], np.float32)
    found = per_row(fr3e(), rollouts(rewards, is_valid=valid))
    np.testing.assert_allclose(found[:4], [0.0, 0.0, 0.5, -0.5], rtol=1e-6)
    np.testing.assert_allclose(found[4:6], np.array([-0.25, 0.25]) * np.exp(0.25), rtol=1e-6)


def test_reward_weights_and_state():
    columns = np.stack([REWARDS, np.full_like(REWARDS, 7.0)], axis=1)
    weighted = fr3e(reward_weights=(1.0, 0.0), sharpen=1.5)
    np.testing.assert_allclose(run(weighted, rollouts(columns))[0], run(fr3e(sharpen=1.5))[0], rtol=1e-6)
    state = weighted.init()
    assert (float(state.epsilon), float(state.exponent)) == (np.float32(1e-6), 1.5)
    assert weighted.min_group_size == 2 and not weighted.requires


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "max"}, "value must be mean or positive_fraction, got 'max'"),
        ({"v0": "one"}, "v0 must be zero, own or complement, got 'one'"),
        ({"sharpen": 0.0}, r"sharpen must be None or above 0 and finite, got 0\.0"),
        ({"scale_rewards": "batch"}, "scale_rewards must be none or group, got 'batch'"),
        ({"epsilon": 0.0}, r"epsilon must be above 0, got 0\.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        fr3e(**options)


def check_fr3e(golden, precision):
    """`entropy_fr3e_advantage*`: groups of `group_index` are questions, their states in the order of `index`.

    The exponential is one of float32 numbers there. A state of one row has its raw reward there and 0 here, which also
    changes the values of its question: left out.
    """
    del precision
    question, index, mask = golden["group_index"], golden["index"], golden["response_mask"] > 0
    state = np.unique(index, return_inverse=True)[1]
    first = np.array([state[question == q].min() for q in question])
    leader = np.array([np.flatnonzero(state == s)[0] for s in first])
    rows = rollouts(
        golden["rewards"], mask, np.where(state == first, -1, leader), 1 + state - first, state.astype(np.int32)
    )
    alone = np.array([(state == s).sum() == 1 for s in state])
    compared = np.array([not alone[question == q].any() for q in question])
    assert compared.any()
    for key in (k for k in golden if k.startswith("adv_sharpen")):
        sharpen, no_std = (int(x[-1]) for x in key.removeprefix("adv_").split("_"))
        estimator = fr3e(
            value="positive_fraction",
            v0="complement",
            sharpen=1.5 if sharpen else None,
            scale_rewards="none" if no_std else "group",
        )
        ours = np.asarray(jax.jit(estimator.estimate)(rows, estimator.init())[0])
        close(ours[compared], golden[key][compared], FLOAT32_SCALAR)
        assert not ours[alone].any()


test_released_code = make_test({"entropy_fr3e_advantage*": (check_fr3e, DOUBLE)})

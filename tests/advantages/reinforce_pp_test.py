"""REINFORCE++ by hand: returns, whitening per token and per response, groups that do not take part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy.advantages.reinforce_pp import reinforce_pp, reinforce_pp_baseline, whitened_returns

MASK = np.array([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]], bool)
REWARDS = np.array([1.0, 0.0, 9.0, 3.0], np.float32)


def whiten(values, mask, weight=None):
    """Of the values on the mask; `weight`: of each entry, with the number of units in the place of their count."""
    x = values[mask].astype(np.float64)
    w = np.ones(len(x)) if weight is None else weight[mask]
    mean = (w * x).sum() / w.sum()
    variance = (w * (x - mean) ** 2).sum() / (w.sum() - 1.0)
    result = np.zeros(mask.shape)
    result[mask] = (x - mean) / np.sqrt(variance + 1e-8)
    return result


def run(estimator, rewards=REWARDS, mask=MASK, **kwargs):
    return toy.estimate(estimator, toy.rollouts(mask, rewards=rewards, **kwargs))


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-7)


def test_rewards_of_all_tokens_are_whitened_together():
    advantage, metrics = run(reinforce_pp())
    values = np.broadcast_to(REWARDS[:, None], MASK.shape)  # six tokens: 1 1 1 0 3 3, mean 1.5, variance 1.5
    np.testing.assert_allclose(
        whiten(values, MASK)[[0, 1, 3], 1], np.array([-0.5, -1.5, 1.5]) / np.sqrt(1.5), rtol=1e-7
    )
    close(advantage, whiten(values, MASK))
    assert metrics["critic/rewards/mean"] == (13.0, 4.0) and "actor/reward_kl_penalty" not in metrics


def test_a_response_weighs_as_much_as_another_by_sequence():
    advantage, _ = run(reinforce_pp(whiten_unit="sequence"))
    rows = np.array([1.0, 0.0, 3.0])  # the row without tokens does not count
    wanted = (rows - rows.mean()) / np.sqrt(rows.var(ddof=1) + 1e-8)
    close(advantage[[0, 1, 3], 1], wanted)
    length = np.maximum(MASK.sum(1, keepdims=True), 1)
    close(
        advantage, whiten(np.broadcast_to(REWARDS[:, None], MASK.shape), MASK, np.broadcast_to(1 / length, MASK.shape))
    )


@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_the_divergence_is_paid_per_token_and_the_reward_on_the_last_one(fill):
    old = np.where(MASK, -np.arange(20.0).reshape(4, 5) / 8, fill).astype(np.float32)
    ref = np.where(MASK, -1.0, fill).astype(np.float32)
    estimator = reinforce_pp(gamma=0.5, kl_coef=0.25)
    advantage, metrics = run(estimator, logp_old=old, token_data={"ref_log_prob": ref})
    kl = np.where(MASK, old + 1.0, 0.0)
    r0 = 1.0 - 0.25 * kl[0, 4]  # row 0 has a hole in column 3, which neither discounts nor cuts
    r0 = [-0.25 * kl[0, 1] + 0.5 * (-0.25 * kl[0, 2] + 0.5 * r0), -0.25 * kl[0, 2] + 0.5 * r0, r0]
    r3 = 3.0 - 0.25 * kl[3, 2]
    returns = np.zeros(MASK.shape)
    returns[0, [1, 2, 4]], returns[1, 1], returns[3, 1:3] = r0, -0.25 * kl[1, 1], [-0.25 * kl[3, 1] + 0.5 * r3, r3]
    close(advantage, whiten(returns, MASK))
    assert metrics["actor/reward_kl_penalty"] == (kl.sum(), 6.0)
    assert estimator.requires == ("ref_log_prob",) and reinforce_pp().requires == ()


def test_without_the_reference():
    with pytest.raises(ValueError, match=r"a kl_coef above 0 needs token_data\['ref_log_prob'\], got \[\]"):
        run(reinforce_pp(kl_coef=0.1))


def test_returns_are_given_besides():
    mask = jnp.ones((1, 3), bool)
    advantage, returns = jax.jit(whitened_returns)(jnp.array([[4.0, 2.0, 8.0]]), mask, jnp.float32(0.5))
    np.testing.assert_array_equal(returns, [[7.0, 6.0, 8.0]])
    close(advantage, [[0.0, -1.0, 1.0]])


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("factory", [reinforce_pp, reinforce_pp_baseline])
def test_nothing_to_compare_gives_zero(factory, unit):
    one_token = np.zeros(MASK.shape, bool)
    one_token[0, 2] = True
    for mask in (one_token, np.zeros(MASK.shape, bool)):
        assert not run(factory(whiten_unit=unit), mask=mask)[0].any()
    assert not run(factory(whiten_unit=unit), np.full(4, 0.1, np.float32))[0].any()
    one_row = np.zeros(MASK.shape, bool)
    one_row[0] = True
    assert not run(factory(whiten_unit=unit), mask=one_row)[0].any()


@pytest.mark.parametrize("factory", [reinforce_pp, reinforce_pp_baseline])
def test_rows_that_are_not_valid_do_not_take_part(factory):
    rewards = np.array([1.0, 0.0, 2.0, np.nan], np.float32)
    valid = np.isfinite(rewards)
    advantage, _ = run(factory(), rewards, row_data={"is_valid": valid})
    close(advantage, whiten(np.broadcast_to(rewards[:, None], MASK.shape), MASK & valid[:, None]))


GROUP = np.array([2, 2, 0, 1, 1, 2])
MANY = np.tril(np.ones((6, 6), bool))
SCORES = np.array([1.0, 0.25, 5.0, 0.1, 0.1, 0.0], np.float32)
CENTRED = np.array([1.0, 0.25, 0.0, 0.0, 0.0, 0.0]) - np.array([5, 5, 0, 0, 0, 5]) / 12  # row 2 is alone


def run_groups(**options):
    return run(reinforce_pp_baseline(**options), SCORES, MANY, group=GROUP)[0]


@pytest.mark.parametrize(
    ("options", "centred", "left_out"),
    [
        ({}, CENTRED, [2]),
        ({"drop_degenerate": True}, CENTRED, [2, 3, 4]),
        ({"singleton": "raw"}, CENTRED + 5.0 * (np.arange(6) == 2), []),
        ({"singleton": "raw", "drop_degenerate": True}, CENTRED + 5.0 * (np.arange(6) == 2), [3, 4]),
    ],
)
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_rewards_against_their_group(options, centred, left_out, unit):
    advantage = run_groups(whiten_unit=unit, **options)
    kept = MANY & ~np.isin(np.arange(6), left_out)[:, None]
    weight = None if unit == "token" else np.broadcast_to(1.0 / MANY.sum(1, keepdims=True), MANY.shape)
    close(advantage, whiten(np.broadcast_to(centred[:, None], MANY.shape), kept, weight))
    assert not advantage[left_out].any()
    if not options and unit == "token":  # -mean / std, as in the released code
        assert advantage[3, 0] == advantage[4, 0] > 0.0


def test_a_response_without_tokens_is_of_its_group():
    mask = MANY.copy()
    mask[5] = False
    advantage, _ = run(reinforce_pp_baseline(), SCORES, mask, group=GROUP)
    kept = mask & (np.arange(6) != 2)[:, None]
    close(advantage, whiten(np.broadcast_to(CENTRED[:, None], mask.shape), kept))


def test_group_sizes():
    assert reinforce_pp().min_group_size == 1
    assert reinforce_pp_baseline().min_group_size == 2
    assert reinforce_pp_baseline(singleton="raw").min_group_size == 1


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (reinforce_pp, {"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1\.5"),
        (reinforce_pp, {"kl_coef": -0.1}, r"kl_coef must be finite and at least 0, got -0\.1"),
        (reinforce_pp, {"kl_coef": float("inf")}, r"kl_coef must be finite and at least 0, got inf"),
        (reinforce_pp, {"whiten_unit": "row"}, "whiten_unit must be token or sequence, got 'row'"),
        (reinforce_pp_baseline, {"whiten_unit": "row"}, "whiten_unit must be token or sequence, got 'row'"),
        (reinforce_pp_baseline, {"singleton": "one"}, "singleton must be zero or raw, got 'one'"),
    ],
)
def test_refusals(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**options)

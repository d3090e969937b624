"""Stored outputs of released code: group quantiles, rewards standardised one by one; see `golden_cases`."""

import functools
from fractions import Fraction
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import BOTH, DOUBLE, FLOAT32_SCALAR, TOLERANCE, close, make_test
from toy import rollouts

from jentropy import stats
from jentropy.advantages.gdpo import gdpo
from jentropy.advantages.grpo import grpo
from jentropy.advantages.qae import group_quantile, qae


@functools.cache
def _advantage(function):
    return jax.jit(lambda *args: function(*args)[0])


def advantage_of(estimator, rewards, group, mask, *, nan_is_zero=False):
    """`[B, T]`; a reward that is NaN is one that its grader did not give, or is 0."""
    known = ~np.isnan(rewards) | nan_is_zero
    row_data = {"is_valid": known.any(axis=1), "reward_is_valid": known}
    batch = rollouts(mask, rewards=np.nan_to_num(rewards), group=group, row_data=row_data)
    return np.asarray(_advantage(estimator.estimate)(batch, estimator.init()))


def rank_of(k, size, rule):
    """The exact rank, from 0, of `paper` and `lower`."""
    return ceil(k * size) - 1 if rule == "paper" else int(k * (size - 1))


def check_qae(golden, precision):
    """`entropy_qae_*`: one group per row of `rewards`, of any size; a group of one gets its raw reward in the source.

    `paper_baseline` is 1[p > 1 - K] in floats: where p = 1 - K its side is rounding, and the baseline is 0 here.
    """
    rewards = golden["rewards"]
    num_groups, size = rewards.shape
    flat, group = rewards.reshape(-1, 1), np.repeat(np.arange(num_groups, dtype=np.int32), size)
    mask, alike = np.ones((flat.size, 1), bool), np.ptp(rewards, axis=1) == 0
    is_binary = np.isin(rewards, (0.0, 1.0)).all()
    for text in sorted({key.rpartition("_K")[2] for key in golden if "_K" in key}):
        parts, exact = stats.fraction_parts(float(text)), Fraction(text)

        def quantile(rule, parts=parts):
            valid = jnp.ones(flat.size, bool)
            found = group_quantile(jnp.asarray(flat[:, 0]), jnp.asarray(group), valid, parts, rule)
            return np.asarray(found).reshape(rewards.shape)[:, 0]

        for rule in ("paper", "lower"):
            np.testing.assert_array_equal(quantile(rule), np.sort(rewards, axis=1)[:, rank_of(exact, size, rule)])
        np.testing.assert_array_equal(quantile("paper"), golden[f"infdef_baseline_K{text}"])
        if is_binary:
            edge = np.array([int(successes) == size * (1 - exact) for successes in rewards.sum(axis=1)])
            np.testing.assert_array_equal(quantile("paper")[~edge], golden[f"paper_baseline_K{text}"][~edge])
            assert not quantile("paper")[edge].any()
        if rank_of(exact, size, "lower") == int(float(text) * (size - 1)):
            np.testing.assert_array_equal(quantile("lower"), golden[f"lower_quantile_K{text}"])
        close(quantile("linear"), golden[f"repo_baseline_K{text}"], TOLERANCE[precision])
        for name, scale in (("std", "group"), ("nostd", "none")):
            estimator = qae(quantile_k=float(text), baseline="linear", scale_rewards=scale)
            ours = advantage_of(estimator, flat, group, mask).reshape(rewards.shape)
            assert not ours[alike].any()
            close(ours[~alike], golden[f"repo_adv_{name}_K{text}"][~alike], TOLERANCE[precision])


def check_gdpo(golden, precision):
    """`entropy_gdpo_*`: the authors' forks of TRL and verl, both sources proper, and NeMo-RL without leave-one-out.

    All ran in float32. The forks give NaN for groups of one row, which is 0 here. Our groups of equal rewards are
    exactly 0 where the batch is not whitened over tokens.
    """
    rewards = golden["rewards"].astype(np.float64 if precision == "f64" else np.float32)
    mask, size = golden["response_mask"] > 0, int(golden["group_size"])
    group = (np.arange(len(rewards)) // size).astype(np.int32)
    weight = tuple(np.broadcast_to(golden["weights"], rewards.shape[1:]).tolist())
    whole = np.ones((len(rewards), 1), bool)
    sequences = {
        "trlgdpo_adv": (gdpo(reward_weights=weight), True),
        "trlgdpo_pre_bn": (gdpo(reward_weights=weight, final_norm="none"), True),
        "trlgdpo_grpo_adv": (grpo(reward_weights=weight, epsilon=1e-4), True),
        "trlmain_normalize_then_sum": (gdpo(reward_weights=weight), False),
        "trlmain_sum_then_normalize": (grpo(reward_weights=weight, epsilon=1e-4), False),
        "nemo_adv_noloo": (gdpo(reward_weights=weight, epsilon=1e-12), False),
    }
    for key, (estimator, nan_is_zero) in sequences.items():
        if key in golden:
            ours = advantage_of(estimator, rewards, group, whole, nan_is_zero=nan_is_zero)[:, 0]
            close(ours, np.zeros(len(ours)) if size == 1 else golden[key], TOLERANCE["f32"])
            constant = np.array([(np.ptp(rewards[group == g], axis=0) == 0).all() for g in group])
            assert not ours[constant].any()
    tokens = {
        "verl091_adv": gdpo(reward_weights=weight, epsilon=1e-6, final_norm="token"),
        "verlgdpo_adv_equal_weights": gdpo(epsilon=1e-6, final_norm="token"),
    }
    for key, estimator in tokens.items():
        if key in golden:
            ours = advantage_of(estimator, rewards, group, mask)
            close(ours, np.zeros(ours.shape) if size == 1 else golden[key], TOLERANCE["f32"])


def check_trl(golden, precision):
    """`base_trl_adv_*`: TRL's sum of rewards that were normalised before."""
    rewards = golden["rewards_per_func"]
    group = (np.arange(len(rewards)) // int(golden["num_generations"])).astype(np.int32)
    estimator = gdpo(reward_weights=tuple(golden["reward_weights"].tolist()), epsilon=float(golden["eps"]))
    ours = advantage_of(estimator, rewards, group, np.ones((len(rewards), 1), bool))
    close(ours[:, 0], golden["adv_grpo_normalize_then_sum"], FLOAT32_SCALAR)


FAMILIES = {
    "entropy_qae_*": (check_qae, DOUBLE),
    "entropy_gdpo_*": (check_gdpo, BOTH),
    "base_trl_adv_*": (check_trl, DOUBLE),
}


test_released_code = make_test(FAMILIES)

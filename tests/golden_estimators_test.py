"""Stored outputs of released estimators: returns, baselines, whitening, rejection; see `golden_cases`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import (
    DOUBLE,
    TOLERANCE,
    check_group_rows,
    close,
    estimate,
    make_test,
    relative,
    whitened_as_in_verl,
)
from toy import loss_and_gradient, rollouts, signals, update

from jentropy import normalisers, stats, surrogates
from jentropy.advantages.opo import opo
from jentropy.advantages.raft import raft, reinforce_rej
from jentropy.advantages.reinforce_pp import reinforce_pp_baseline, whitened_returns
from jentropy.advantages.remax import remax
from jentropy.advantages.rloo import rloo
from jentropy.mechanisms.clip_range import clip_range


@functools.cache
def _jitted(function):
    return jax.jit(lambda *args: function(*args))


def check_reinforce_pp(golden, precision):
    """`base_rfpp_*`: verl, rewards per token."""
    mask, reward = golden["response_mask"] > 0, jnp.asarray(golden["token_level_rewards"])
    gamma = float(golden["gamma"])
    advantage, returns = _jitted(whitened_returns)(reward, jnp.asarray(mask), jnp.asarray(gamma))
    relative(returns, golden["returns"], TOLERANCE[precision])
    close(
        whitened_as_in_verl(np.asarray(advantage), golden["returns"], mask), golden["advantages"], TOLERANCE[precision]
    )


def check_remax(golden, precision):
    """`base_remax_*`: verl, whose returns go on through tokens that are not of the response; here 0 stands there."""
    mask, tolerance = golden["response_mask"] > 0, TOLERANCE[precision]
    reward, greedy = np.where(mask, golden["token_level_rewards"], 0.0), golden["reward_baselines"]
    returns = np.asarray(_jitted(stats.reward_to_go)(jnp.asarray(reward), jnp.asarray(mask), jnp.asarray(1.0)))
    relative(returns[mask], golden["returns"][mask], tolerance)
    rows = rollouts(mask, rewards=reward.sum(axis=1), row_data={"greedy_reward": greedy})
    ours = np.asarray(_jitted(remax().estimate)(rows, remax().init())[0])
    assert not ours[~mask].any()
    earned = returns - reward.sum(axis=1, keepdims=True)  # 0 before the reward, which stands on the last token
    relative((ours + earned)[mask], golden["advantages"][mask], tolerance)


def check_group_estimators(golden, precision):
    """`base_groupadv_*`: verl. Without a token in a group OPO's baseline is NaN there, and nothing here."""
    mask, group, scores = golden["response_mask"] > 0, golden["index"], golden["scores"]
    several = np.array([(group == g).sum() > 1 for g in group])
    tokens = np.array([mask[group == g].any() for g in group])
    theirs = golden["adv_opo"]
    assert not np.isnan(theirs[tokens]).any()
    ours = estimate(opo(singleton="raw"), scores, group, mask)
    check_group_rows(ours[tokens], theirs[tokens], group[tokens], TOLERANCE[precision])
    alike = several & np.array([np.ptp(scores[group == g]) == 0 for g in group])
    assert not ours[alike].any() and not ours[~mask].any()
    centred = scores - np.where(several, [scores[group == g].mean() for g in group], 0.0)
    ours = estimate(reinforce_pp_baseline(singleton="raw"), scores, group, mask)
    values = np.where(alike, 0.0, centred)[:, None] * mask
    check_group_rows(whitened_as_in_verl(ours, values, mask), golden["adv_rfpp_baseline"], group, TOLERANCE[precision])
    dropped = estimate(reinforce_pp_baseline(singleton="raw", drop_degenerate=True), scores, group, mask)
    assert not dropped[alike].any()


def check_rloo_divergence(golden, precision):
    """`base_trl_adv_*`: TRL's RLOO with the divergence in the reward; all rewards weigh 1 there."""
    rewards, mask = golden["rewards_per_func"], golden["completion_mask"] > 0
    num_rows = len(rewards)
    scorable = ~np.isnan(rewards).all(axis=1)
    rows = rollouts(
        mask,
        rewards=np.nan_to_num(rewards),
        group=np.arange(num_rows) // int(golden["num_generations"]),
        logp_old=np.where(mask, golden["old_logps"], np.nan),
        token_data={"ref_log_prob": np.where(mask, golden["ref_logps"], np.nan)},
        row_data={"is_valid": scorable},
    )
    estimator = rloo(kl_coef=float(golden["beta"]))
    ours = np.asarray(_jitted(estimator.estimate)(rows, estimator.init())[0])
    wanted = np.where(mask, golden["adv_rloo_kl"][:, None], 0.0)
    relative(ours, wanted, TOLERANCE[precision])


MINIMAL_RL = {
    "raft": (raft(), "adv_raft"),
    "rej": (reinforce_rej(singleton="raw"), "adv_reinforce_rej"),
}


def check_minimal_rl(golden, precision):
    """`base_minimalrl_*`: rewards of -1 and 1; token means divide by `N + 1e-8`."""
    mask, dtype = golden["response_mask"] > 0, np.float64 if precision == "f64" else np.float32
    batch = rollouts(mask, logp_old=golden["old_log_prob"].astype(dtype))
    scored = signals(batch, log_prob=golden["log_prob"].astype(dtype))
    clip = clip_range(epsilon_low=float(golden["cliprange"]), epsilon_high=float(golden["cliprange"]))
    scale = mask.sum() / (mask.sum() + 1e-8)
    losses = {
        "vanilla": surrogates.reinforce,
        "plusplus": surrogates.dual_clip(clip_ratio_c=float(golden["clip_ratio_c"])),
    }
    for key in (k for k in golden if k.startswith("loss_")):
        loss, method = re.fullmatch(r"loss_(vanilla|plusplus)_(raft|rej)", key).groups()
        estimator, stored = MINIMAL_RL[method]
        advantage = estimate(estimator, golden["scores"], golden["index"], mask)
        np.testing.assert_array_equal(advantage, golden[stored])
        plan = update(clip, scored, jnp.asarray(advantage, dtype))
        value, gradient, _ = loss_and_gradient(plan, scored, surrogate=losses[loss], normaliser=normalisers.token_mean)
        close(value * scale, golden[key], TOLERANCE[precision])
        close(gradient * scale, golden[f"grad_{loss}_{method}"], TOLERANCE[precision])


FAMILIES = {
    "base_rfpp_*": (check_reinforce_pp, DOUBLE),
    "base_remax_*": (check_remax, DOUBLE),
    "base_groupadv_*": (check_group_estimators, DOUBLE),
    "base_trl_adv_*": (check_rloo_divergence, DOUBLE),
    "base_minimalrl_*": (check_minimal_rl, ("f64", "f32")),
}

test_released_code = make_test(FAMILIES)

"""REINFORCE++: returns whitened over the whole rollout, without or with the group's mean as baseline."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, hyper, require

_WHITEN = {"token": stats.whiten, "sequence": stats.whiten_rows}


class ReinforcePpState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar, the discount γ and the divergence's coefficient β, scalars."""

    reward_weights: Array
    gamma: Array
    kl_coef: Array


class ReinforcePpBaselineState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar."""

    reward_weights: Array


def whitened_returns(
    token_reward: Array, mask: Array, gamma: Array, *, whiten_unit: str = "token"
) -> tuple[Array, Array]:
    """The reward-to-go of rewards per token, whitened, and as it is: both `[B, T]`, 0 outside the mask.

    Args:
      token_reward: `[B, T]` float.
      mask: `[B, T]` bool.
      gamma: the discount, a float scalar; see `stats.reward_to_go`.
      whiten_unit: `"token"` (`stats.whiten`) or `"sequence"` (`stats.whiten_rows`).
    """
    returns = stats.reward_to_go(token_reward, mask, gamma)
    return _WHITEN[whiten_unit](returns, mask), returns


@dataclasses.dataclass(frozen=True)
class _Estimate:
    whiten_unit: str
    use_reference: bool

    def __call__(
        self, rollouts: Rollouts, state: ReinforcePpState
    ) -> tuple[Array, Mapping[str, Array], Metrics, ReinforcePpState]:
        used = rollouts.loss_mask & outcome.valid_rows(rollouts)[:, None]
        reward = outcome.total_reward(rollouts, state.reward_weights)
        token_reward, extra = jnp.where(outcome.last_token(used), reward[:, None], 0.0), {}
        if self.use_reference:
            divergence = outcome.log_ratio_to_reference(rollouts).astype(reward.dtype)
            token_reward -= state.kl_coef.astype(reward.dtype) * divergence
            extra = outcome.divergence_metrics(rollouts, divergence)
        advantage, _ = whitened_returns(token_reward, used, state.gamma, whiten_unit=self.whiten_unit)
        return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **extra}, state


def reinforce_pp(
    *,
    gamma: float = 1.0,
    kl_coef: float = 0.0,
    whiten_unit: str = "token",
    reward_weights: tuple[float, ...] | None = None,
) -> Estimator:
    """The reward-to-go with the divergence from the reference in the reward, whitened over the whole rollout.

        r_t = 1[t last] R - β (logp_old_t - ref_log_prob_t),   R_t = r_t + γ R_{t+1}
        A_t = (R_t - mean) / sqrt(var + 1e-8)

    The mean and the variance (ddof 1) are over all response tokens of the rollout, so long responses weigh more; fewer
    than two tokens, or returns that are all equal, give 0. Prompts are not compared with themselves: a group plays no
    part. Tokens of a response that are not trained on are skipped (early versions of verl cut the return there). Rows
    with `row_data["is_valid"]` False do not take part and get 0. Reports `actor/reward_kl_penalty`, the token mean of
    the divergence without β.

    Args:
      gamma: γ, in [0, 1].
      kl_coef: β, finite and at least 0; above 0 it needs `token_data["ref_log_prob"]`. verl: `use_kl_in_reward` with
        `kl_ctrl.kl_coef`, of 1e-3 when on.
      whiten_unit: `"token"`, as released, or `"sequence"`: every response weighs the same.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: a value is out of range or unknown or, when traced, the number of weights is wrong or `ref_log_prob`
        is missing.

    Reference: 2501.03262; released code: verl 0.9.1, `reinforce_plus_plus`.

    >>> reinforce_pp(gamma=0.9).estimate == reinforce_pp().estimate
    True
    """
    require(0.0 <= gamma <= 1.0, "gamma", gamma, "in [0, 1]")
    require(0.0 <= kl_coef < float("inf"), "kl_coef", kl_coef, "finite and at least 0")
    require(whiten_unit in _WHITEN, "whiten_unit", whiten_unit, "token or sequence")
    return Estimator(
        init=lambda weights=None: ReinforcePpState(
            outcome.weights_state(reward_weights, weights), hyper(gamma), hyper(kl_coef)
        ),
        estimate=_Estimate(whiten_unit, use_reference=kl_coef > 0.0),
        requires=("ref_log_prob",) if kl_coef > 0.0 else (),
    )


@dataclasses.dataclass(frozen=True)
class _BaselineEstimate:
    whiten_unit: str
    singleton: str
    drop_degenerate: bool

    def __call__(
        self, rollouts: Rollouts, state: ReinforcePpBaselineState
    ) -> tuple[Array, Mapping[str, Array], Metrics, ReinforcePpBaselineState]:
        group, valid = rollouts.group, outcome.valid_rows(rollouts)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        constant, single = stats.group_is_constant(reward, group, valid), stats.group_count(group, valid) == 1
        centred = jnp.where(constant, 0.0, reward - stats.group_mean(reward, group, valid))
        kept = valid
        if self.drop_degenerate:
            kept &= ~constant | single
        if self.singleton == "raw":
            centred = jnp.where(single, reward, centred)
        else:
            kept &= ~single
        advantage = _WHITEN[self.whiten_unit](outcome.spread(centred, rollouts), rollouts.loss_mask & kept[:, None])
        return advantage, {}, outcome.metrics(rollouts, reward, advantage), state


def reinforce_pp_baseline(
    *,
    whiten_unit: str = "token",
    singleton: str = "zero",
    drop_degenerate: bool = False,
    reward_weights: tuple[float, ...] | None = None,
) -> Estimator:
    """The reward minus its group's mean, whitened over the whole rollout in place of the group.

        a_i = R_i - mean_g R,   A_t = (a_t - mean) / sqrt(var + 1e-8)

    The mean and the variance (ddof 1) are over all response tokens of the rollout, so long responses weigh more, and
    the token mean of `a` is not 0. So a group whose rewards are all equal, with `a` exactly 0, gets
    `-mean / sqrt(var)`, as in the released code: take it out with `drop_degenerate`. With fewer than two tokens, or all
    of one `a`, all is 0. Rows with `row_data["is_valid"]` False do not take part and get 0; a response without tokens
    is of its group.

    The paper's runs put the divergence from the reference into the loss: `kl_reference(estimator="k2")`.

    Args:
      whiten_unit: `"token"`, as released, or `"sequence"`: every response weighs the same, so the mean is 0 if all have
        tokens.
      singleton: a group of one valid row: `"zero"`: it gets 0 and stays out of the mean and the variance; `"raw"`: its
        `a` is the reward itself, as in verl.
      drop_degenerate: groups of two or more equal rewards get exactly 0 and stay out of the mean and the variance.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: an option is unknown or, when traced, the number of weights is wrong.

    Reference: 2501.03262; released code: verl 0.9.1, `reinforce_plus_plus_baseline`.

    >>> reinforce_pp_baseline().min_group_size
    2
    """
    require(whiten_unit in _WHITEN, "whiten_unit", whiten_unit, "token or sequence")
    require(singleton in ("zero", "raw"), "singleton", singleton, "zero or raw")
    return Estimator(
        init=lambda weights=None: ReinforcePpBaselineState(outcome.weights_state(reward_weights, weights)),
        estimate=_BaselineEstimate(whiten_unit, singleton, drop_degenerate),
        min_group_size=2 if singleton == "zero" else 1,
    )

"""RLOO: each reward against the mean of the others of its group."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, hyper, require


class RlooState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar, and the divergence's coefficient β, a scalar."""

    reward_weights: Array
    kl_coef: Array


@dataclasses.dataclass(frozen=True)
class _Estimate:
    singleton: str
    use_reference: bool

    def __call__(self, rollouts: Rollouts, state: RlooState) -> tuple[Array, Mapping[str, Array], Metrics, RlooState]:
        group, valid = rollouts.group, outcome.valid_rows(rollouts)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        score, extra = reward, {}
        if self.use_reference:
            divergence = outcome.log_ratio_to_reference(rollouts).astype(reward.dtype)
            score = reward - state.kl_coef.astype(reward.dtype) * jnp.sum(divergence, axis=1)
            extra = outcome.divergence_metrics(rollouts, divergence)
        count = stats.group_count(group, valid).astype(score.dtype)
        centred = (score - stats.group_mean(score, group, valid)) * (count / jnp.maximum(count - 1.0, 1.0))
        centred = jnp.where(stats.group_is_constant(score, group, valid), 0.0, centred)
        if self.singleton == "raw":
            centred = jnp.where(count == 1.0, score, centred)
        advantage = outcome.spread(centred, rollouts)
        return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **extra}, state


def rloo(
    *, reward_weights: tuple[float, ...] | None = None, singleton: str = "zero", kl_coef: float = 0.0
) -> Estimator:
    """The reward minus the mean of the other G - 1 rewards of its group, on all tokens of the response.

        A_i = R_i - Σ_{j≠i} R_j / (G - 1) = G / (G - 1) · (R_i - mean_g R)
        R_i = reward_i - β Σ_t (logp_old_t - ref_log_prob_t)

    A group whose R are all equal gets exactly 0. Rows with `row_data["is_valid"]` False are not of the group and get 0;
    a response without tokens is. With β above 0, `actor/reward_kl_penalty` is the token mean of the divergence, without
    β; the metrics of rewards stay those of the rewards alone.

    The whole response is one action in the paper and in TRL, whose loss has the ratio of whole sequences: use
    `surrogates.sequence_ratio` for it; verl has a ratio per token (`surrogates.ratio`), whose gradient under
    `sequence_mean_token_sum` is the same at the old policy only. verl gives a group of one row its raw reward
    (`singleton="raw"`).

    Args:
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.
      singleton: advantage of a group of one valid row: `"zero"`, or `"raw"` for R itself.
      kl_coef: β, finite and at least 0; above 0 it needs `token_data["ref_log_prob"]`. TRL's `beta`, 0.05.

    Raises:
      ValueError: a value is out of range or unknown or, when traced, the number of weights is wrong or `ref_log_prob`
        is missing.

    Reference: 2402.14740, eq. 5.

    >>> rloo(reward_weights=(1.0, 0.5)).estimate == rloo().estimate
    True
    """
    require(singleton in ("zero", "raw"), "singleton", singleton, "zero or raw")
    require(0.0 <= kl_coef < float("inf"), "kl_coef", kl_coef, "finite and at least 0")
    return Estimator(
        init=lambda weights=None: RlooState(outcome.weights_state(reward_weights, weights), hyper(kl_coef)),
        estimate=_Estimate(singleton, use_reference=kl_coef > 0.0),
        min_group_size=2 if singleton == "zero" else 1,
        requires=("ref_log_prob",) if kl_coef > 0.0 else (),
    )

"""PRIME: implicit process rewards and the outcome, each against the other responses of its group."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, hyper, require

_SMALL = 1e-6
"""Added to the largest return by which process rewards are divided."""


class PrimeState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar, and scalars: of both sources weight and discount, and β."""

    reward_weights: Array
    process_weight: Array
    outcome_weight: Array
    process_gamma: Array
    outcome_gamma: Array
    beta: Array


def largest_return(reward: Array, mask: Array) -> Array:
    """max |Σ_{s≥t} r_s| over the tokens of the mask, a scalar; `reward`: `[B, T]` float, `mask`: `[B, T]` bool."""
    return jnp.max(jnp.abs(stats.reward_to_go(reward, mask, hyper(1.0))), where=mask, initial=0.0)


def leave_one_out(reward: Array, mask: Array, group: Array, *, baseline: str = "paper") -> Array:
    """Token rewards against the mean rewards of the other rows of the group, `[B, T]`, 0 outside the mask.

    With m_i the mean of r over the n_i tokens of row i, and n the rows of the group that have tokens:

        "paper": r_t - Σ_{j≠i} m_j / (n - 1)
        "code":  r_t n / (n - 1) - Σ_j m_j / (n - 1), which is the paper's plus (r_t - m_i) / (n - 1)

    A row alone in its group gets 0.

    Args:
      reward: `[B, T]` float.
      mask: `[B, T]` bool.
      group: `[B]` int32.
      baseline: `"paper"` or `"code"`.
    """
    chex.assert_rank([reward, mask, group], [2, 2, 1])
    rows, mean = jnp.any(mask, axis=1), stats.masked_mean(reward, mask, axis=1)
    count = stats.group_count(group, rows)
    others = jnp.maximum(count - 1, 1).astype(reward.dtype)
    centred = reward - ((stats.group_sum(mean, group, rows) - mean) / others)[:, None]
    if baseline == "code":
        centred += (reward - mean[:, None]) / others[:, None]
    return jnp.where(mask & (count > 1)[:, None], centred, 0.0)


@dataclasses.dataclass(frozen=True)
class _Estimate:
    baseline: str
    normalise: str
    granularity: str
    whiten: bool

    def _process_reward(self, rollouts: Rollouts, used: Array, beta: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """The rewards per token and the divisor of the normalisation, a scalar."""
        implicit = jnp.where(used, rollouts.token_data["implicit_reward"].astype(dtype), 0.0)
        if self.granularity == "whole":
            implicit = jnp.where(outcome.last_token(used), jnp.sum(implicit, axis=1, keepdims=True), 0.0)
        largest = largest_return(implicit, used)
        if self.normalise == "batch_norm":
            return implicit / (largest + _SMALL), largest
        return beta.astype(dtype) * implicit, largest

    def __call__(self, rollouts: Rollouts, state: PrimeState) -> tuple[Array, Mapping[str, Array], Metrics, PrimeState]:
        if "implicit_reward" not in rollouts.token_data:
            raise ValueError(f"prime needs token_data['implicit_reward'], got {sorted(rollouts.token_data)}")
        group, used = rollouts.group, rollouts.loss_mask & outcome.valid_rows(rollouts)[:, None]
        rows, last = jnp.any(used, axis=1), outcome.last_token(used)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        dtype = reward.dtype
        process, largest = self._process_reward(rollouts, used, state.beta, dtype)
        carriers = last if self.granularity == "whole" else used
        by_process = leave_one_out(process, carriers, group, baseline=self.baseline)
        by_outcome = leave_one_out(jnp.where(last, reward[:, None], 0.0), last, group)
        by_outcome = jnp.where(stats.group_is_constant(reward, group, rows)[:, None], 0.0, by_outcome)
        total = state.process_weight.astype(dtype) * stats.reward_to_go(by_process, used, state.process_gamma)
        total += state.outcome_weight.astype(dtype) * stats.reward_to_go(by_outcome, used, state.outcome_gamma)
        kept = used & (stats.group_count(group, rows) > 1)[:, None]
        advantage = stats.whiten(total, kept) if self.whiten else jnp.where(kept, total, 0.0)
        metrics = {
            "prime/process_reward": (jnp.sum(process), jnp.sum(used, dtype=dtype)),
            "prime/largest_implicit_return": (largest, jnp.ones_like(largest)),
        }
        return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **metrics}, state


def prime(
    *,
    baseline: str = "paper",
    process_weight: float = 1.0,
    outcome_weight: float = 1.0,
    process_gamma: float = 1.0,
    outcome_gamma: float = 1.0,
    normalise: str = "batch_norm",
    beta: float = 0.05,
    granularity: str = "token",
    whiten: bool = True,
    reward_weights: tuple[float, ...] | None = None,
) -> Estimator:
    """Process rewards of an implicit reward model and the outcome, left one out in their group, summed and whitened.

        r_t = q_t / (max |Σ_{s≥t} q_s| + 1e-6),   q = log π_φ - log π_ref on the sampled tokens
        A = whiten(w_p · to_go(r_t - mean_{j≠i} r_j) + w_o · to_go(1[t last] (R_i - mean_{j≠i} R_j)))

    `token_data["implicit_reward"]` is q, which `learners.implicit_reward` gives. The maximum is over the response
    tokens of the whole rollout, so β plays no part in it; `normalise="none"` has r = β q. The mean r_j of a response is
    over its tokens. Both rewards-to-go are discounted and added, then whitened over all response tokens (ddof 1).

    A group whose outcomes are all equal has no outcome advantage, but its process rewards still count. A response
    without tokens is not of its group; rows with `row_data["is_valid"]` False, and a row alone in its group, get 0 and
    stay out of the mean and the variance. Reports `prime/process_reward`, the token mean of r, and
    `prime/largest_implicit_return`, the maximum.

    The released code (`baseline="code"`) has r_t n / (n - 1) - Σ_j r_j / (n - 1), which differs for process rewards
    (`leave_one_out`); it takes the maximum of the rows of one device, leaves `-mean / std` on padding, and a response
    without tokens makes its group NaN. verl's recipe has r = β q, with weights of 5, and drops the process reward of
    the last token.

    Args:
      baseline: `"paper"` or `"code"`.
      process_weight: w_p, finite and at least 0. verl: `reward_dpo_coef`.
      outcome_weight: w_o, finite and at least 0. verl: `reward_gt_coef`.
      process_gamma: discount of the process rewards, in [0, 1]. PRIME: `reward_model_gamma`.
      outcome_gamma: discount of the outcome, in [0, 1].
      normalise: `"batch_norm"` or `"none"`.
      beta: β, finite and above 0; used without normalisation only.
      granularity: `"token"`, or `"whole"`: Σ q on the last token, which is then compared as the outcome is.
      whiten: whether to whiten.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: a value is out of range or unknown or, when traced, the number of weights is wrong or
        `implicit_reward` is missing.

    Reference: 2502.01456, eq. 5; released code: PRIME-RL/PRIME, `compute_rloo_advantage_return`.

    >>> prime(process_weight=0.5).estimate == prime().estimate
    True
    """
    require(baseline in ("paper", "code"), "baseline", baseline, "paper or code")
    require(normalise in ("batch_norm", "none"), "normalise", normalise, "batch_norm or none")
    require(granularity in ("token", "whole"), "granularity", granularity, "token or whole")
    require(0.0 <= process_weight < float("inf"), "process_weight", process_weight, "finite and at least 0")
    require(0.0 <= outcome_weight < float("inf"), "outcome_weight", outcome_weight, "finite and at least 0")
    require(0.0 <= process_gamma <= 1.0, "process_gamma", process_gamma, "in [0, 1]")
    require(0.0 <= outcome_gamma <= 1.0, "outcome_gamma", outcome_gamma, "in [0, 1]")
    require(0.0 < beta < float("inf"), "beta", beta, "finite and above 0")
    numbers = (process_weight, outcome_weight, process_gamma, outcome_gamma, beta)

    def init(weights: tuple[float, ...] | None = None) -> PrimeState:
        return PrimeState(outcome.weights_state(reward_weights, weights), *map(hyper, numbers))

    return Estimator(
        init=init,
        estimate=_Estimate(baseline, normalise, granularity, whiten),
        min_group_size=2,
        requires=("implicit_reward",),
    )

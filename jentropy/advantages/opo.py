"""OPO: each reward against its group's mean, weighted by length."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, require


class OpoState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar."""

    reward_weights: Array


@dataclasses.dataclass(frozen=True)
class _Estimate:
    singleton: str

    def __call__(self, rollouts: Rollouts, state: OpoState) -> tuple[Array, Mapping[str, Array], Metrics, OpoState]:
        group, valid = rollouts.group, outcome.valid_rows(rollouts)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        length = jnp.sum(rollouts.loss_mask, axis=1, dtype=reward.dtype)
        num_tokens = jnp.maximum(stats.group_sum(length, group, valid), 1.0)
        centred = reward - stats.group_sum(length * reward, group, valid) / num_tokens
        constant = stats.group_is_constant(reward, group, valid & (length > 0.0))
        centred = jnp.where(constant, 0.0, centred)
        if self.singleton == "raw":
            centred = jnp.where(stats.group_count(group, valid) == 1, reward, centred)
        advantage = outcome.spread(centred, rollouts)
        return advantage, {}, outcome.metrics(rollouts, reward, advantage), state


def opo(*, singleton: str = "zero", reward_weights: tuple[float, ...] | None = None) -> Estimator:
    """The reward minus its group's mean weighted by length, on all tokens of the response.

        A_i = R_i - Σ_j l_j R_j / Σ_j l_j,   l = response tokens, sums over the group

    The baseline of least variance is the mean reward weighted by the squared norm of each response's gradient; it is
    this one if all tokens have gradients of one size, orthogonal to one another. A response without tokens does not
    weigh in it. A group whose rewards are all equal gets exactly 0. Rows with `row_data["is_valid"]` False are not of
    the group and get 0.

    The paper's runs are strictly on-policy, one update per rollout, without a divergence or an entropy bonus: the
    estimator alone is not the recipe. verl gives a group of one row its raw reward (`singleton="raw"`).

    Args:
      singleton: advantage of a group of one valid row: `"zero"`, or `"raw"` for the reward itself.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: an option is unknown or, when traced, the number of weights is wrong.

    Reference: 2505.23585; released code: verl 0.9.1, `opo`.

    >>> opo(reward_weights=(1.0, 0.5)).estimate == opo().estimate
    True
    """
    require(singleton in ("zero", "raw"), "singleton", singleton, "zero or raw")
    return Estimator(
        init=lambda weights=None: OpoState(outcome.weights_state(reward_weights, weights)),
        estimate=_Estimate(singleton),
        min_group_size=2 if singleton == "zero" else 1,
    )

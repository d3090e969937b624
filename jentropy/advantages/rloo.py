"""RLOO: each reward against the mean of the others of its group."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, require


class RlooState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar."""

    reward_weights: Array


@dataclasses.dataclass(frozen=True)
class _Estimate:
    singleton: str

    def __call__(self, rollouts: Rollouts, state: RlooState) -> tuple[Array, Mapping[str, Array], Metrics, RlooState]:
        group, valid = rollouts.group, outcome.valid_rows(rollouts)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        count = stats.group_count(group, valid).astype(reward.dtype)
        centred = (reward - stats.group_mean(reward, group, valid)) * (count / jnp.maximum(count - 1.0, 1.0))
        centred = jnp.where(stats.group_is_constant(reward, group, valid), 0.0, centred)
        if self.singleton == "raw":
            centred = jnp.where(count == 1.0, reward, centred)
        advantage = outcome.spread(centred, rollouts)
        return advantage, {}, outcome.metrics(rollouts, reward, advantage), state


def rloo(*, reward_weights: tuple[float, ...] | None = None, singleton: str = "zero") -> Estimator:
    """The reward minus the mean of the other G - 1 rewards of its group, on all tokens of the response.

        A_i = R_i - Σ_{j≠i} R_j / (G - 1) = G / (G - 1) · (R_i - mean_g R)

    A group whose rewards are all equal gets exactly 0. Rows with `row_data["is_valid"]` False are not of the group and
    get 0; a response without tokens is.

    verl gives a group of one row its raw reward (`singleton="raw"`). TRL's loss uses the ratio of whole sequences and
    puts the divergence from the reference in the reward, before the baseline.

    Args:
      reward_weights: one number per reward column, None for all 1: the columns are summed first.
      singleton: advantage of a group of one valid row: `"zero"`, or `"raw"` for the reward itself.

    Raises:
      ValueError: an option is unknown or, when traced, the number of weights is wrong.

    Reference: 2402.14740, eq. 5.

    >>> rloo(reward_weights=(1.0, 0.5)).estimate == rloo().estimate
    True
    """
    require(singleton in ("zero", "raw"), "singleton", singleton, "zero or raw")
    return Estimator(
        init=lambda: RlooState(outcome.weights_state(reward_weights)),
        estimate=_Estimate(singleton),
        min_group_size=2 if singleton == "zero" else 1,
    )

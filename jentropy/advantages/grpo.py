"""GRPO: rewards standardised within their group."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, hyper, require


class GrpoState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar, and ε, a scalar."""

    reward_weights: Array
    epsilon: Array


@dataclasses.dataclass(frozen=True)
class _Estimate:
    scale_rewards: str
    singleton: str

    def _scale(self, reward: Array, group: Array, valid: Array, epsilon: Array) -> Array:
        """The divisor, `[B]`."""
        if self.scale_rewards == "none":
            return jnp.ones_like(reward)
        if self.scale_rewards == "batch":
            std = jnp.broadcast_to(jnp.sqrt(stats.masked_variance(reward, valid, ddof=1)), reward.shape)
        else:
            std = stats.group_std(reward, group, valid)
            if self.singleton == "raw":
                std = jnp.where(stats.group_count(group, valid) == 1, 1.0, std)
        return std + epsilon.astype(reward.dtype)

    def __call__(self, rollouts: Rollouts, state: GrpoState) -> tuple[Array, Mapping[str, Array], Metrics, GrpoState]:
        group, valid = rollouts.group, outcome.valid_rows(rollouts)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        centred = reward - stats.group_mean(reward, group, valid)
        centred = jnp.where(stats.group_is_constant(reward, group, valid), 0.0, centred)
        if self.singleton == "raw":
            centred = jnp.where(stats.group_count(group, valid) == 1, reward, centred)
        advantage = outcome.spread(centred / self._scale(reward, group, valid, state.epsilon), rollouts)
        return advantage, {}, outcome.metrics(rollouts, reward, advantage), state


def grpo(
    *,
    scale_rewards: str = "group",
    epsilon: float = 1e-6,
    reward_weights: tuple[float, ...] | None = None,
    singleton: str = "zero",
) -> Estimator:
    """The reward minus its group's mean, over its group's standard deviation, on all tokens of the response.

        A_i = (R_i - mean_g R) / (std_g R + ε)

    The standard deviation has ddof 1. A group whose rewards are all equal gets exactly 0. Rows with
    `row_data["is_valid"]` False do not enter the statistics and get 0; a response without tokens does enter them.
    `scale_rewards="none"` is Dr. GRPO's advantage (use `normalisers.fixed_length` with it).

    verl gives a group of one row its raw reward (`singleton="raw"`); TRL's ε is 1e-4.

    Args:
      scale_rewards: `"group"`; `"batch"`: the standard deviation of all rows of the rollout; `"none"`: 1.
      epsilon: ε, above 0.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.
      singleton: advantage of a group of one valid row: `"zero"`, or `"raw"`: the reward itself in place of the centred
        one, and 1 for the group's standard deviation.

    Raises:
      ValueError: an option is unknown, ε is not above 0 or, when traced, the number of weights is wrong.

    Reference: 2402.03300, section 4.1; Dr. GRPO: 2503.20783.

    >>> grpo(epsilon=1e-4).estimate == grpo().estimate
    True
    """
    require(scale_rewards in ("group", "batch", "none"), "scale_rewards", scale_rewards, "group, batch or none")
    require(epsilon > 0.0, "epsilon", epsilon, "above 0")
    require(singleton in ("zero", "raw"), "singleton", singleton, "zero or raw")
    return Estimator(
        init=lambda weights=None: GrpoState(outcome.weights_state(reward_weights, weights), hyper(epsilon)),
        estimate=_Estimate(scale_rewards, singleton),
        min_group_size=2 if singleton == "zero" else 1,
    )

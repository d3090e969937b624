"""REINFORCE with outcome rewards: the reward itself, or against the mean of the rollout."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, require


class ReinforceState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar."""

    reward_weights: Array


@dataclasses.dataclass(frozen=True)
class _Estimate:
    baseline: str

    def __call__(
        self, rollouts: Rollouts, state: ReinforceState
    ) -> tuple[Array, Mapping[str, Array], Metrics, ReinforceState]:
        reward = outcome.total_reward(rollouts, state.reward_weights)
        value = reward
        if self.baseline == "batch_mean":
            value = reward - stats.masked_mean(reward, outcome.valid_rows(rollouts))
        advantage = outcome.spread(value, rollouts)
        return advantage, {}, outcome.metrics(rollouts, reward, advantage), state


def reinforce(*, baseline: str = "none", reward_weights: tuple[float, ...] | None = None) -> Estimator:
    """The reward-to-go, which for one reward at the end and no discount is the reward, on all tokens of the response.

        A_i = R_i - b,   b = 0 or the mean reward of the rollout

    The batch mean holds the row's own reward, which scales the expected gradient by `1 - 1/B`. Rows with
    `row_data["is_valid"]` False do not enter the mean and get 0.

    Args:
      baseline: `"none"` or `"batch_mean"`.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: an option is unknown or, when traced, the number of weights is wrong.

    Reference: Williams (1992), doi 10.1007/BF00992696.

    >>> reinforce(baseline="batch_mean").min_group_size
    1
    """
    require(baseline in ("none", "batch_mean"), "baseline", baseline, "none or batch_mean")
    return Estimator(
        init=lambda weights=None: ReinforceState(outcome.weights_state(reward_weights, weights)),
        estimate=_Estimate(baseline),
    )

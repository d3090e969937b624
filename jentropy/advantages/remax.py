"""ReMax: each reward against that of the greedy response to the same prompt."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome
from jentropy.base import Array, Estimator, Metrics, Rollouts


class RemaxState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar."""

    reward_weights: Array


def _estimate(rollouts: Rollouts, state: RemaxState) -> tuple[Array, Mapping[str, Array], Metrics, RemaxState]:
    if "greedy_reward" not in rollouts.row_data:
        raise ValueError(f"remax needs row_data['greedy_reward'], got {sorted(rollouts.row_data)}")
    valid = outcome.valid_rows(rollouts)
    reward = outcome.total_reward(rollouts, state.reward_weights)
    greedy = jnp.where(valid, rollouts.row_data["greedy_reward"], 0.0).astype(reward.dtype)
    advantage = outcome.spread(reward - greedy, rollouts)
    extra = {"critic/greedy_rewards/mean": (jnp.sum(greedy), jnp.sum(valid, dtype=reward.dtype))}
    return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **extra}, state


def remax() -> Estimator:
    """The reward minus the reward of the greedy response to the row's prompt, on all tokens of the response.

        A_i = R_i - R(greedy response to prompt i)

    The baseline does not depend on the row's own tokens, so the gradient is unbiased, with one response per prompt too.
    `row_data["greedy_reward"]` `[B]` holds it as one number per row: it costs one greedy response per prompt. Both
    rewards are sums with the weights of the task's graders. Rows with `row_data["is_valid"]` False get 0.

    verl takes the reward-to-go of rewards per token, which for one reward at the end is the same on response tokens.

    Raises:
      ValueError: when traced, `greedy_reward` is missing or the number of weights is wrong.

    Reference: 2310.10505; released code: verl 0.9.1, `remax`.

    >>> remax().requires
    ('greedy_reward',)
    """
    return Estimator(
        init=lambda weights=None: RemaxState(outcome.weights_state(None, weights)),
        estimate=_estimate,
        requires=("greedy_reward",),
    )

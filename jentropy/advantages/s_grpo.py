"""S-GRPO: of the correct answers at the exits of one thought, the earlier ones earn more."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, hyper, require


class SGrpoState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar, and the decay d, a scalar."""

    reward_weights: Array
    decay: Array


def decayed_reward(correct: Array, exit_order: Array, group: Array, row_id: Array, decay: Array) -> Array:
    """d^(N - 1) for a correct row, N the correct ones of its group up to its exit; 0 for a wrong one. `[B]` float.

    Args:
      correct: `[B]` bool, False for rows that do not take part.
      exit_order: `[B]` int32, ascending from the earliest exit to the full response; ties break by `row_id`.
      group, row_id: `[B]` int32.
      decay: d, float scalar.
    """
    order, other = exit_order[:, None], exit_order[None, :]
    up_to = (other < order) | ((other == order) & (row_id[None, :] <= row_id[:, None]))
    peer = correct[None, :] & (group[None, :] == group[:, None])
    earlier = jnp.maximum(stats.count_true(peer & up_to, 1) - 1, 0).astype(decay.dtype)
    return jnp.where(correct, jnp.power(decay, earlier), 0.0)


def _estimate(rollouts: Rollouts, state: SGrpoState) -> tuple[Array, Mapping[str, Array], Metrics, SGrpoState]:
    if "exit_order" not in rollouts.row_data:
        raise ValueError(f"s_grpo needs row_data['exit_order'], got {sorted(rollouts.row_data)}")
    group, valid = rollouts.group, outcome.valid_rows(rollouts)
    reward = outcome.total_reward(rollouts, state.reward_weights)
    wrong = jnp.sum(valid & (reward != 0.0) & (reward != 1.0), dtype=reward.dtype)
    correct, order = valid & (reward == 1.0), rollouts.row_data["exit_order"]
    decayed = decayed_reward(correct, order, group, rollouts.row_id, state.decay.astype(reward.dtype))
    centred = decayed - stats.group_mean(decayed, group, valid)
    centred = jnp.where(stats.group_is_constant(decayed, group, valid), 0.0, centred)
    advantage = outcome.spread(centred, rollouts)
    extra = {
        "error/reward is not 0 or 1": (wrong, jnp.ones_like(wrong)),
        "s_grpo/decayed_reward/mean": (stats.masked_sum(decayed, valid), jnp.sum(valid, dtype=reward.dtype)),
    }
    return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **extra}, state


def s_grpo(*, decay: float = 0.5, reward_weights: tuple[float, ...] | None = None) -> Estimator:
    """The decayed reward minus its group's mean, without a standard deviation, on all tokens of the response.

        r_i = d^(N_i - 1) if row i is correct, else 0;   A_i = r_i - mean_g r

    A group is one thought that was stopped at several points and answered there, and the full response, last.
    `row_data["exit_order"]` `[B]` int32 holds the order of its rows, ties break by `row_id`. N_i counts the correct
    rows of the group up to and with row i, so the reward decays with each correct answer and not with each exit: the
    earliest correct one earns 1. A group whose decayed rewards are all equal gets exactly 0. Rows with
    `row_data["is_valid"]` False are not of the group and get 0. A total reward other than 0 or 1, in a valid row, stops
    a run. Whether tokens of the shared thought and of the text that ends it are trained on is a matter of the loss
    mask. The objective has the normaliser `sequence_mean_token_mean` and no divergence from a reference.

    Reports `s_grpo/decayed_reward/mean` over valid rows.

    Args:
      decay: d, above 0 and at most 1; 1 rewards every correct answer alike.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: decay is out of range or, when traced, `exit_order` is missing or the number of weights is wrong.

    Reference: 2505.07686, from a third party's notes and implementation.

    >>> s_grpo().requires
    ('exit_order',)
    """
    require(0.0 < decay <= 1.0, "decay", decay, "above 0 and at most 1")
    return Estimator(
        init=lambda weights=None: SGrpoState(outcome.weights_state(reward_weights, weights), hyper(decay)),
        estimate=_estimate,
        min_group_size=2,
        requires=("exit_order",),
    )

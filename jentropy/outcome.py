"""What estimators of outcome rewards share: one reward per row, rows that do not take part, group metrics."""

import chex
import jax.numpy as jnp

from jentropy import stats
from jentropy.base import Array, Metrics, Rollouts, hyper


def weights_state(reward_weights: tuple[float, ...] | None) -> Array:
    """The weights as an array `[R]`, or the scalar 1 for None: all rewards weigh 1."""
    return hyper(1.0) if reward_weights is None else jnp.asarray(reward_weights, hyper(0.0).dtype)


def valid_rows(rollouts: Rollouts) -> Array:
    """`row_data["is_valid"]` `[B]` bool, or all rows where it is absent."""
    return rollouts.row_data.get("is_valid", jnp.ones_like(rollouts.row_id, bool))


def total_reward(rollouts: Rollouts, weights: Array) -> Array:
    """The weighted sum of the reward columns, `[B]`; 0 in rows that are not valid, whatever they hold.

    Args:
      rollouts: the rows of one rollout.
      weights: `[R]`, or a scalar for all columns, as `weights_state` makes it.

    Raises:
      ValueError: the number of weights is not R.
    """
    chex.assert_rank(rollouts.rewards, 2)
    num_rewards = rollouts.rewards.shape[1]
    if weights.ndim == 1 and weights.shape[0] != num_rewards:
        raise ValueError(f"reward_weights has {weights.shape[0]} numbers for {num_rewards} reward columns")
    rewards = jnp.where(valid_rows(rollouts)[:, None], rollouts.rewards, 0.0)
    return jnp.sum(rewards * jnp.broadcast_to(weights.astype(rewards.dtype), (1, num_rewards)), axis=1)


def spread(advantage: Array, rollouts: Rollouts) -> Array:
    """One advantage per row `[B]` on all its response tokens, `[B, T]`; 0 elsewhere and in rows that are not valid."""
    chex.assert_rank(advantage, 1)
    used = rollouts.loss_mask & valid_rows(rollouts)[:, None]
    return jnp.where(used, advantage[:, None], 0.0)


def metrics(rollouts: Rollouts, reward: Array, advantage: Array) -> Metrics:
    """`(sum, count)` of what every estimator reports.

    Args:
      rollouts: the rows of one rollout.
      reward: `[B]`, see `total_reward`.
      advantage: `[B, T]`.

    Returns:
      `critic/rewards/mean` over valid rows, `critic/advantages/mean` over their response tokens, and over groups with a
      valid row `frac_reward_zero_std` (all rewards equal) and `reward_std` (ddof 1, 0 for a group of one).
    """
    valid, dtype = valid_rows(rollouts), reward.dtype
    used = rollouts.loss_mask & valid[:, None]
    index = jnp.arange(valid.shape[0])
    earlier = (rollouts.group[None, :] == rollouts.group[:, None]) & (index[None, :] < index[:, None])
    leads = valid & ~jnp.any(earlier & valid[None, :], axis=1)
    num_groups = jnp.sum(leads, dtype=dtype)
    constant = stats.group_is_constant(reward, rollouts.group, valid)
    std = stats.group_std(reward, rollouts.group, valid)
    return {
        "critic/rewards/mean": (jnp.sum(reward), jnp.sum(valid, dtype=dtype)),
        "critic/advantages/mean": (stats.masked_sum(advantage, used), jnp.sum(used, dtype=dtype)),
        "frac_reward_zero_std": (jnp.sum(leads & constant, dtype=dtype), num_groups),
        "reward_std": (stats.masked_sum(std, leads), num_groups),
    }

"""What estimators of outcome rewards share: one reward per row, rows that do not take part, group metrics."""

import chex
import jax
import jax.numpy as jnp

from jentropy import ratios, stats
from jentropy.base import Array, Metrics, Rollouts, hyper

SAME_ADVANTAGE = 1e-5
"""Fraction of a group's largest advantage below which a difference of two of its advantages is rounding."""


def weights_state(reward_weights: tuple[float, ...] | None, task_weights: tuple[float, ...] | None = None) -> Array:
    """The weights as an array `[R]`: a method's own or, for None, those of the task; the scalar 1 if both are None."""
    weights = task_weights if reward_weights is None else reward_weights
    return hyper(1.0) if weights is None else jnp.asarray(weights, hyper(0.0).dtype)


def valid_rows(rollouts: Rollouts) -> Array:
    """`row_data["is_valid"]` `[B]` bool, or all rows where it is absent."""
    return rollouts.row_data.get("is_valid", jnp.ones_like(rollouts.row_id, bool))


def valid_rewards(rollouts: Rollouts) -> Array:
    """Which rewards take part, `[B, R]` bool: those of valid rows.

    A grader may have no reward for a row that others do grade: such are False in `row_data["reward_is_valid"]`
    `[B, R]` bool, where it is there.
    """
    valid = jnp.broadcast_to(valid_rows(rollouts)[:, None], rollouts.rewards.shape)
    return valid & rollouts.row_data.get("reward_is_valid", jnp.ones_like(valid))


def total_reward(rollouts: Rollouts, weights: Array) -> Array:
    """The weighted sum of the reward columns, `[B]`; rewards that are not valid count as 0, whatever they hold.

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
    rewards = jnp.where(valid_rewards(rollouts), rollouts.rewards, 0.0)
    return jnp.sum(rewards * jnp.broadcast_to(weights.astype(rewards.dtype), (1, num_rewards)), axis=1)


def log_ratio_to_reference(rollouts: Rollouts) -> Array:
    """`logp_old - ref_log_prob` on the response tokens of valid rows, `[B, T]`, 0 elsewhere.

    Its sum is k1, the unbiased estimate of D_KL(π_old || π_ref) that belongs into a reward.

    Raises:
      ValueError: `ref_log_prob` is missing.
    """
    if "ref_log_prob" not in rollouts.token_data:
        raise ValueError(f"a kl_coef above 0 needs token_data['ref_log_prob'], got {sorted(rollouts.token_data)}")
    used = rollouts.loss_mask & valid_rows(rollouts)[:, None]
    return ratios.log_ratio(rollouts.logp_old, rollouts.token_data["ref_log_prob"], used)


def divergence_metrics(rollouts: Rollouts, divergence: Array) -> Metrics:
    """`actor/reward_kl_penalty`: the mean of `log_ratio_to_reference` over the response tokens of valid rows."""
    used = rollouts.loss_mask & valid_rows(rollouts)[:, None]
    return {"actor/reward_kl_penalty": (jnp.sum(divergence), jnp.sum(used, dtype=divergence.dtype))}


def spread(advantage: Array, rollouts: Rollouts) -> Array:
    """One advantage per row `[B]` on all its response tokens, `[B, T]`; 0 elsewhere and in rows that are not valid."""
    chex.assert_rank(advantage, 1)
    used = rollouts.loss_mask & valid_rows(rollouts)[:, None]
    return jnp.where(used, advantage[:, None], 0.0)


def last_token(used: Array) -> Array:
    """The last True of every row, `[B, T]` bool: none for a row without one; `used`: `[B, T]` bool."""
    chex.assert_rank(used, 2)
    column = jnp.broadcast_to(jnp.arange(used.shape[1])[None, :], used.shape)
    return used & (column == jnp.max(jnp.where(used, column, -1), axis=1, keepdims=True))


def reward_resolution(rollouts: Rollouts, advantage: Array) -> tuple[Array, Array]:
    """Distinct advantages over distinct reward vectors, as `(sum, count)`; below 1 rewards have collapsed.

    Both are counted within groups and then summed over the groups that have at least two distinct reward vectors: in
    the others there is nothing to tell apart. GRPO on the sum of two rewards gives (1, 0) and (0, 1) one advantage: 3
    for the 4 combinations, .75 (reward collapse, 2601.05242).

    Valid rows with response tokens count. Reward vectors are compared exactly. The advantage of a row is the mean over
    its response tokens; neighbours in the order of a group's advantages are the same if they differ by at most
    `SAME_ADVANTAGE` of its largest absolute one, so that rounding does not count.

    Args:
      rollouts: the rows of one rollout.
      advantage: `[B, T]`.
    """
    tokens = rollouts.loss_mask & valid_rows(rollouts)[:, None]
    used, group, index = jnp.any(tokens, axis=1), rollouts.group, jnp.arange(tokens.shape[0])
    peer = used[None, :] & (group[None, :] == group[:, None])
    earlier, known = index[None, :] < index[:, None], valid_rewards(rollouts)
    same = jnp.ones_like(peer)
    for k in range(known.shape[1]):
        has, x = known[:, k], jnp.where(known[:, k], rollouts.rewards[:, k], 0.0)
        same &= (has[None, :] == has[:, None]) & (x[None, :] == x[:, None])
    new_vector = used & ~jnp.any(peer & same & earlier, axis=1)
    row = stats.masked_mean(advantage, tokens, axis=1)
    largest = jax.ops.segment_max(jnp.where(used, jnp.abs(row), 0.0), group, num_segments=group.size)[group]
    above = row[:, None] - row[None, :]
    near = (above > 0.0) & (above <= SAME_ADVANTAGE * largest[:, None])
    new_advantage = used & ~jnp.any(peer & (near | ((above == 0.0) & earlier)), axis=1)
    differ = stats.group_sum(new_vector.astype(row.dtype), group, used) > 1.0
    return jnp.sum(new_advantage & differ, dtype=row.dtype), jnp.sum(new_vector & differ, dtype=row.dtype)


def _metrics_of_several(rollouts: Rollouts, advantage: Array) -> Metrics:
    known = valid_rewards(rollouts)
    total = stats.masked_sum(rollouts.rewards, known, axis=0)
    count = jnp.sum(known, axis=0, dtype=total.dtype)
    means = {f"rewards/{k}/mean": (total[k], count[k]) for k in range(known.shape[1])}
    return {**means, "reward_resolution": reward_resolution(rollouts, advantage)}


def metrics(rollouts: Rollouts, reward: Array, advantage: Array) -> Metrics:
    """`(sum, count)` of what every estimator reports.

    Args:
      rollouts: the rows of one rollout.
      reward: `[B]`, see `total_reward`.
      advantage: `[B, T]`.

    Returns:
      `critic/rewards/mean` over valid rows, `critic/advantages/mean` over their response tokens, and over groups with a
      valid row `frac_reward_zero_std` (all rewards equal) and `reward_std` (ddof 1, 0 for a group of one). With more
      than one reward column also the mean of each, `rewards/0/mean` and so on, and `reward_resolution`.
    """
    valid, dtype = valid_rows(rollouts), reward.dtype
    used = rollouts.loss_mask & valid[:, None]
    index = jnp.arange(valid.shape[0])
    earlier = (rollouts.group[None, :] == rollouts.group[:, None]) & (index[None, :] < index[:, None])
    leads = valid & ~jnp.any(earlier & valid[None, :], axis=1)
    num_groups = jnp.sum(leads, dtype=dtype)
    constant = stats.group_is_constant(reward, rollouts.group, valid)
    std = stats.group_std(reward, rollouts.group, valid)
    several = _metrics_of_several(rollouts, advantage) if rollouts.rewards.shape[1] > 1 else {}
    return {
        **several,
        "critic/rewards/mean": (jnp.sum(reward), jnp.sum(valid, dtype=dtype)),
        "critic/advantages/mean": (stats.masked_sum(advantage, used), jnp.sum(used, dtype=dtype)),
        "frac_reward_zero_std": (jnp.sum(leads & constant, dtype=dtype), num_groups),
        "reward_std": (stats.masked_sum(std, leads), num_groups),
    }

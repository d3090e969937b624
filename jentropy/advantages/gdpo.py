"""GDPO: each reward standardised in its group on its own, then summed, then normalised over the batch."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, hyper, require


class GdpoState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar, and ε, a scalar."""

    reward_weights: Array
    epsilon: Array


def standardise(reward: Array, group: Array, valid: Array, epsilon: Array) -> Array:
    """(r - mean_g) / (std_g + ε) over the valid rows of each group, `[B]`; 0 in other rows and in constant groups."""
    centred = reward - stats.group_mean(reward, group, valid)
    centred = jnp.where(valid & ~stats.group_is_constant(reward, group, valid), centred, 0.0)
    return centred / (stats.group_std(reward, group, valid) + epsilon)


@dataclasses.dataclass(frozen=True)
class _Estimate:
    final_norm: str

    def __call__(self, rollouts: Rollouts, state: GdpoState) -> tuple[Array, Mapping[str, Array], Metrics, GdpoState]:
        reward = outcome.total_reward(rollouts, state.reward_weights)
        known, epsilon = outcome.valid_rewards(rollouts), state.epsilon.astype(reward.dtype)
        rows = jnp.any(known, axis=1)
        columns = jax.vmap(standardise, (1, None, 1, None), 1)(
            jnp.where(known, rollouts.rewards, 0.0), rollouts.group, known, epsilon
        )
        weights = jnp.broadcast_to(state.reward_weights.astype(reward.dtype), (1, columns.shape[1]))
        total = jnp.sum(columns * weights, axis=1)
        advantage = outcome.spread(self._normalised(total, rows, jnp.any(columns != 0.0, axis=1), epsilon), rollouts)
        if self.final_norm == "token":
            advantage = stats.whiten(advantage, rollouts.loss_mask & rows[:, None])
        return advantage, {}, outcome.metrics(rollouts, reward, advantage), state

    def _normalised(self, total: Array, rows: Array, informed: Array, epsilon: Array) -> Array:
        """Over the valid rows, `[B]`; where no reward says anything, the rounding of the mean is left out."""
        if self.final_norm != "sequence":
            return total
        centred = jnp.where(informed, total - stats.masked_mean(total, rows), 0.0)
        return centred / (jnp.sqrt(stats.masked_variance(total, rows, ddof=1)) + epsilon)


def gdpo(
    *,
    reward_weights: tuple[float, ...] | None = None,
    epsilon: float = 1e-4,
    final_norm: str = "sequence",
) -> Estimator:
    """Rewards decoupled: each is standardised within its group before they are summed.

        A_i = Σ_k w_k (r_ik - mean_g r_k) / (std_g r_k + ε),   then (A_i - mean A) / (std A + ε) over the batch

    Standard deviations have ddof 1. GRPO sums first, so combinations of rewards with one sum get one advantage, and a
    reward of large spread drowns the others; here each has the spread of its weight in every group. Rewards of equal
    weight and equal spread in a group still give (1, 0) and (0, 1) one advantage: spreads that differ, or the weights,
    tell them apart. The metric `reward_resolution` says how many combinations keep an advantage of their own, for both.

    A reward that is constant in a group adds exactly 0 there, and so does a group of one row. The batch is the rollout.
    Rows with `row_data["is_valid"]` False do not enter any statistic and get 0; a response without tokens does enter
    them. A reward that a grader did not give is False in `row_data["reward_is_valid"]` `[B, R]`, where that is there:
    it is not of its group's statistics and adds 0; a row without any is not of the batch and gets 0. That is TRL's rule
    for NaN; the authors' TRL fork takes NaN for a reward of 0 before the statistics.

    Final normalisation over tokens is verl's: (A - mean) / sqrt(var + 1e-8) with every token counted, so long
    responses shift the mean, and a response of which no reward says anything gets what the mean leaves over. Its ε is
    1e-6. Over sequences the mean is 0 but for rounding.

    Args:
      reward_weights: w, one number per reward column, None for the weights of the task's graders.
      epsilon: ε, above 0, of the groups and of the normalisation over sequences.
      final_norm: `"sequence"` (paper, TRL), `"token"` (verl) or `"none"`.

    Raises:
      ValueError: an option is unknown, ε is not above 0 or, when traced, the number of weights is wrong.

    Reference: 2601.05242; released code: NVlabs/GDPO; TRL's `multi_objective_aggregation="normalize_then_sum"`.

    >>> gdpo(reward_weights=(2.0, 1.0)).estimate == gdpo(epsilon=1e-6).estimate
    True
    """
    require(epsilon > 0.0, "epsilon", epsilon, "above 0")
    require(final_norm in ("sequence", "token", "none"), "final_norm", final_norm, "sequence, token or none")
    return Estimator(
        init=lambda weights=None: GdpoState(outcome.weights_state(reward_weights, weights), hyper(epsilon)),
        estimate=_Estimate(final_norm),
        min_group_size=2,
    )

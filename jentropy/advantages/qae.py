"""QAE: rewards against a quantile of their group."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, hyper, require


class QaeState(NamedTuple):
    """K as an exact ratio of int32, the weights of the rewards, `[R]` or a scalar, and ε, a scalar."""

    quantile_k: stats.FractionParts
    reward_weights: Array
    epsilon: Array


def group_quantile(reward: Array, group: Array, valid: Array, quantile_k: stats.FractionParts, rule: str) -> Array:
    """The K-quantile of the valid rows of each row's group by one of the rules of `qae`, `[B]`."""
    count = stats.group_count(group, valid)
    if rule == "paper":
        floor, rest = stats.fraction_divmod(count, quantile_k)
        return stats.group_order_statistic(reward, group, valid, floor + (rest > 0).astype(floor.dtype) - 1)
    floor, rest = stats.fraction_divmod(jnp.maximum(count - 1, 0), quantile_k)
    low = stats.group_order_statistic(reward, group, valid, floor)
    if rule == "lower":
        return low
    high = stats.group_order_statistic(reward, group, valid, floor + 1)
    weight = rest.astype(reward.dtype) / quantile_k.denominator.astype(reward.dtype)
    return jnp.where(low == high, low, low * (1.0 - weight) + high * weight)


@dataclasses.dataclass(frozen=True)
class _Estimate:
    baseline: str
    scale_rewards: str

    def __call__(self, rollouts: Rollouts, state: QaeState) -> tuple[Array, Mapping[str, Array], Metrics, QaeState]:
        group, valid = rollouts.group, outcome.valid_rows(rollouts)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        baseline = group_quantile(reward, group, valid, state.quantile_k, self.baseline)
        per_row = jnp.where(valid, reward - baseline, 0.0)
        if self.scale_rewards == "group":
            per_row = per_row / (stats.group_std(reward, group, valid) + state.epsilon.astype(reward.dtype))
        advantage = outcome.spread(per_row, rollouts)
        num_rows = jnp.sum(valid, dtype=reward.dtype)
        metrics = {
            "qae/baseline": (stats.masked_sum(baseline, valid), num_rows),
            "qae/zero_advantage_fraction": (jnp.sum(valid & (per_row == 0.0), dtype=reward.dtype), num_rows),
        }
        return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **metrics}, state


def qae(
    *,
    quantile_k: float = 0.4,
    baseline: str = "paper",
    scale_rewards: str = "none",
    epsilon: float = 1e-6,
    reward_weights: tuple[float, ...] | None = None,
) -> Estimator:
    """The reward minus the K-quantile of its group, on all tokens of the response.

        A_i = R_i - b_K,   b_K = inf{x : F(x) >= K}: of G sorted rewards the one at rank ⌈K G⌉, counted from 1

    With rewards 0 and 1 and a success rate p, b_K = 0 if p <= 1 - K: failures get nothing, rare successes are
    reinforced; else b_K = 1: successes get nothing, the failures that are left are pushed down. ⌈K G⌉ is counted in
    integers, so p = 1 - K falls on the right side. Among all baselines in [0, 1], b_K makes the first-order change of
    entropy, -η Cov(log π, π (R - b)), smallest in the first case and largest in the second (theorem 1). The theorem is
    about this form, without centring: the exact gradient in expectation does not depend on the baseline.

    A group whose rewards are all equal gets exactly 0, and so does a group of one row. Rows with
    `row_data["is_valid"]` False are not of the group and get 0; a response without tokens is.

    The released code replaces GRPO's mean by `torch.quantile`, which interpolates, and keeps its standard deviation:
    `baseline="linear"`, `scale_rewards="group"`. Its baselines may be fractional: .8 for 5 successes of 8 at K = .4.
    It gives a group of one row its raw reward.

    Args:
      quantile_k: K, in (0, 1); that of the authors' scripts by default. With a larger K more groups have b_K = 1.
      baseline: `"paper"`; `"linear"`: interpolated at K (G - 1) of the sorted rewards; `"lower"`: the reward at
        ⌊K (G - 1)⌋, counted from 0.
      scale_rewards: `"none"`, or `"group"`: divide by the group's standard deviation (ddof 1) plus ε.
      epsilon: ε, above 0; without effect for `"none"`.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: an option is unknown, a number is out of range or, when traced, the number of weights is wrong.

    Reference: 2509.22611; released code: junkangwu/QAE.

    >>> qae(quantile_k=0.2).estimate == qae(epsilon=1e-4).estimate
    True
    """
    require(0.0 < quantile_k < 1.0, "quantile_k", quantile_k, "in (0, 1)")
    require(baseline in ("paper", "linear", "lower"), "baseline", baseline, "paper, linear or lower")
    require(scale_rewards in ("none", "group"), "scale_rewards", scale_rewards, "none or group")
    require(epsilon > 0.0, "epsilon", epsilon, "above 0")
    return Estimator(
        init=lambda weights=None: QaeState(
            stats.fraction_parts(quantile_k), outcome.weights_state(reward_weights, weights), hyper(epsilon)
        ),
        estimate=_Estimate(baseline, scale_rewards),
        min_group_size=2,
    )

"""FR3E: the advantage within each state of a forked rollout, scaled by what the block before it has gained."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats, tree
from jentropy.base import Array, Estimator, Metrics, Rollouts, hyper, require


class Fr3eState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar; ε and the exponent p of the sharpening, scalars."""

    reward_weights: Array
    epsilon: Array
    exponent: Array


def exponential(gain: Array) -> Array:
    """α(ΔV) = exp(-ΔV)."""
    return jnp.exp(-gain)


@dataclasses.dataclass(frozen=True)
class _Estimate:
    alpha_fn: Callable[[Array], Array]
    value: str
    v0: str
    sharpen: bool
    scale_rewards: str

    def _gain(self, earned: Array, rollouts: Rollouts, valid: Array, exponent: Array) -> Array:
        """ΔV of each row's state, `[B]`."""
        value = tree.prefix_values(earned, rollouts.group, valid)
        before, known = tree.previous_value(value, rollouts, valid)
        first = {"zero": value, "own": jnp.zeros_like(value), "complement": 1.0 - value}[self.v0]
        gain = jnp.where(rollouts.parent < 0, first, jnp.where(known, value - before, 0.0))
        if not self.sharpen:
            return gain
        size = jnp.power(jnp.abs(gain), exponent.astype(gain.dtype))
        total = stats.group_sum(size, tree.root_group(rollouts), tree.state_leads(rollouts, valid))
        return jnp.sign(gain) * jnp.where(total > 0.0, size / jnp.where(total > 0.0, total, 1.0), 0.0)

    def __call__(self, rollouts: Rollouts, state: Fr3eState) -> tuple[Array, Mapping[str, Array], Metrics, Fr3eState]:
        group, valid = rollouts.group, outcome.valid_rows(rollouts)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        centred = reward - stats.group_mean(reward, group, valid)
        centred = jnp.where(stats.group_is_constant(reward, group, valid), 0.0, centred)
        earned = reward if self.value == "mean" else (centred > 0.0).astype(reward.dtype)
        gain = self._gain(earned, rollouts, valid, state.exponent)
        alpha = self.alpha_fn(gain)
        if self.scale_rewards == "group":
            centred /= stats.group_std(reward, group, valid) + state.epsilon.astype(reward.dtype)
        advantage = outcome.spread(alpha * centred, rollouts)
        leads = tree.state_leads(rollouts, valid)
        num_states = jnp.sum(leads, dtype=reward.dtype)
        extra = {
            "fr3e/value_gain": (stats.masked_sum(gain, leads), num_states),
            "fr3e/alpha": (stats.masked_sum(alpha, leads), num_states),
        }
        return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **extra}, state


def fr3e(
    *,
    alpha_fn: Callable[[Array], Array] = exponential,
    value: str = "mean",
    v0: str = "zero",
    sharpen: float | None = None,
    scale_rewards: str = "none",
    epsilon: float = 1e-6,
    reward_weights: tuple[float, ...] | None = None,
) -> Estimator:
    """The reward minus the mean of its state, less where the state is a gain over the one before it, more where a loss.

        A_i = α(V(S_j) - V(S_{j-1})) (R_i - mean_j R),   α(ΔV) = exp(-ΔV)

    Row i was drawn from the state S_j: a prompt, or a prompt and the first tokens of a base trajectory, see `tree`.
    V(S_j) is the mean reward of the valid rows drawn from it, S_{j-1} the state before it on the base trajectory; where
    that has no valid row among the rows, ΔV is 0. Without forks, all states are prompts. A state whose rewards are all
    equal gets exactly 0. Rows with `row_data["is_valid"]` False do not enter the statistics and get 0. Tokens of a
    reused prefix are not of the loss mask, and get nothing.

    The released code is `value="positive_fraction", v0="complement", sharpen=1.5`, the last by its script. V is the
    fraction of rows with a positive advantage then, so a state whose rows are all correct has the value 0, not 1. A
    group of one row has its raw reward there: 0 here.

    Reports `fr3e/value_gain` and `fr3e/alpha`, means over the states with a valid row.

    Args:
      alpha_fn: ΔV `[B]` -> α `[B]`, of the module or frozen, so that equal functions share a compilation.
      value: V of a state: `"mean"` reward of its rows, or the `"positive_fraction"` of their advantages.
      v0: ΔV of a prompt, which no state precedes: `"zero"`, V - 0; `"own"`, V - V = 0, no modulation; `"complement"`,
        1 - V. A choice of ours: the released code has the last.
      sharpen: exponent p, above 0, of ΔV <- sign(ΔV) |ΔV|^p / Σ |ΔV|^p, the sum over all states that come from one
        prompt (0 if all are 0); None for ΔV as it is.
      scale_rewards: `"none"`, or `"group"`: the difference is divided by std_j R + ε, ddof 1.
      epsilon: ε, above 0.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: a number is out of range, an option is unknown or, when traced, the number of weights is wrong.

    Reference: 2507.07017; released code: Zheng0428/FR3E, `compute_srpo_outcome_advantage`.

    >>> fr3e(sharpen=1.5).estimate == fr3e(sharpen=2.0).estimate
    True
    """
    require(value in ("mean", "positive_fraction"), "value", value, "mean or positive_fraction")
    require(v0 in ("zero", "own", "complement"), "v0", v0, "zero, own or complement")
    require(sharpen is None or 0.0 < sharpen < float("inf"), "sharpen", sharpen, "None or above 0 and finite")
    require(scale_rewards in ("none", "group"), "scale_rewards", scale_rewards, "none or group")
    require(epsilon > 0.0, "epsilon", epsilon, "above 0")
    exponent = 1.0 if sharpen is None else sharpen
    return Estimator(
        init=lambda weights=None: Fr3eState(
            outcome.weights_state(reward_weights, weights), hyper(epsilon), hyper(exponent)
        ),
        estimate=_Estimate(alpha_fn, value, v0, sharpen is not None, scale_rewards),
        min_group_size=2,
    )

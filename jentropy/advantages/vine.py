"""VinePPO: each reasoning step's advantage, from Monte-Carlo values of the states before and after it."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy import outcome, stats, tree
from jentropy.base import Array, Estimator, Metrics, Rollouts

REQUIRES = ("step_id", "prefix_value", "prefix_known")


class VineState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar."""

    reward_weights: Array


def step_advantages(reward: Array, value: Array, known: Array, num_steps: Array) -> Array:
    """A_k = r_k + V_{k+1} - V_k for the steps of each row, `[B, S]`, 0 behind its last one.

    The state behind the last step has the value 0, whatever is given. States that are not known are filled from the end
    with V_k = r_k + V_{k+1}, so their step has the advantage 0, exactly.

    Args:
      reward: `[B, S]` float, r_k, what step k earned.
      value: `[B, S + 1]` float, V_k, of the state before step k.
      known: `[B, S + 1]` bool; values that are not known are ignored.
      num_steps: `[B]` int32, 0..S.
    """
    chex.assert_rank([reward, value, known, num_steps], [2, 2, 2, 1])
    chex.assert_equal_shape([value, known])
    chex.assert_shape(value, (reward.shape[0], reward.shape[1] + 1))

    def step(later: Array, column: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        r, v, is_known, is_step = column
        filled = r + later
        now = jnp.where(is_step, jnp.where(is_known, v, filled), 0)
        return now, jnp.where(is_step, filled - now, 0)

    is_step = jnp.arange(reward.shape[1], dtype=jnp.int32)[None, :] < num_steps[:, None]
    columns = (reward.T, value[:, :-1].T, known[:, :-1].T, is_step.T)
    _, advantage = jax.lax.scan(step, jnp.zeros_like(reward, shape=num_steps.shape), columns, reverse=True)
    return advantage.T


def _checked(rollouts: Rollouts) -> tuple[Array, Array, Array]:
    missing = [name for name in REQUIRES if name not in rollouts.row_data]
    if missing:
        raise ValueError(f"vine needs row_data[{missing[0]!r}], got {sorted(rollouts.row_data)}")
    step_id, value, known = (rollouts.row_data[name] for name in REQUIRES)
    chex.assert_type([step_id, value, known], [int, float, bool])
    chex.assert_equal_shape([step_id, rollouts.loss_mask])
    chex.assert_equal_shape([value, known])
    if value.ndim != 2 or value.shape[1] < 2:
        raise ValueError(f"prefix_value must be [B, S + 1] with S at least 1, got {value.shape}")
    return step_id, value, known


@dataclasses.dataclass(frozen=True)
class _Estimate:
    whiten: bool

    def __call__(self, rollouts: Rollouts, state: VineState) -> tuple[Array, Mapping[str, Array], Metrics, VineState]:
        step_id, value, known = _checked(rollouts)
        valid = outcome.valid_rows(rollouts)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        used = rollouts.loss_mask & valid[:, None]
        step = tree.last_known(step_id, used & (step_id >= 0))
        num_steps = jnp.max(jnp.where(used, step + 1, 0), axis=1)
        column = jnp.arange(value.shape[1] - 1, dtype=jnp.int32)[None, :]
        at_end = jnp.where(column == num_steps[:, None] - 1, reward[:, None], 0.0)
        per_step = step_advantages(at_end, value.astype(reward.dtype), known, num_steps)
        inside = jnp.clip(step, 0, per_step.shape[1] - 1)
        advantage = jnp.where(used, jnp.take_along_axis(per_step, inside, axis=1), 0.0)
        if self.whiten:
            advantage = stats.whiten(advantage, used)
        is_step = column < num_steps[:, None]
        beyond = jnp.sum(num_steps > per_step.shape[1], dtype=reward.dtype)
        num_known = jnp.sum(known[:, :-1] & is_step, dtype=reward.dtype)
        extra = {
            "error/step_id has no prefix_value": (beyond, jnp.ones_like(beyond)),
            "vine/frac_known": (num_known, jnp.sum(is_step, dtype=reward.dtype)),
        }
        return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **extra}, state


def vine(*, whiten: bool = True, reward_weights: tuple[float, ...] | None = None) -> Estimator:
    """What each reasoning step added to the value of the response so far, on all tokens of the step.

        A_k = r_k + V(s_{k+1}) - V(s_k)

    s_k is the prompt and the first k steps; r_k is the total reward at the last step, 0 before. V(s_k) is the mean
    reward of a few responses sampled from s_k: no critic, no discount. The state behind the last step has the value 0.
    States that nobody sampled from are filled from the end, V(s_k) = r_k + V(s_{k+1}), so their steps get 0 before
    whitening. The rows hold

        row_data["step_id"]       [B, T]      int32   step of each token, 0 first; -1 where there is none
        row_data["prefix_value"]  [B, S + 1]  float   V(s_k), in units of the total reward
        row_data["prefix_known"]  [B, S + 1]  bool    whether anybody sampled from s_k

    A response token without a step is of the step before it, as the token that ends a response, or of the first; a
    response without any is a single step. A step that the S + 1 values do not reach stops a run. The advantages are
    whitened over the response tokens of all valid rows, ddof 1; with fewer than two, or all equal, they are 0. Rows
    with `row_data["is_valid"]` False do not take part and get 0.

    Reports `vine/frac_known`, the fraction of states before a step whose value was sampled.

    Args:
      whiten: standardise over the batch, as the released code does before PPO's loss.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: when traced, an entry of the rows is missing, S is 0 or the number of weights is wrong.

    Reference: 2410.01679; released code: McGill-NLP/VinePPO, `math_episode_generator_with_mc_advantages.py`.

    >>> vine().requires
    ('step_id', 'prefix_value', 'prefix_known')
    """
    return Estimator(
        init=lambda weights=None: VineState(outcome.weights_state(reward_weights, weights)),
        estimate=_Estimate(whiten),
        requires=REQUIRES,
    )

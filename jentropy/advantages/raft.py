"""RAFT and Reinforce-Rej: learning from correct responses only, and from prompts that are neither solved nor lost."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Estimator, Metrics, Rollouts, require

_LOWEST = {"signed": -1.0, "binary": 0.0}


class RaftState(NamedTuple):
    """The weights of the rewards, `[R]` or a scalar."""

    reward_weights: Array


def _signed(reward: Array, rollouts: Rollouts, kind: str) -> tuple[Array, Metrics]:
    """The rewards as -1 and 1, `[B]`, and the number of valid rows whose reward is neither of the two of its kind."""
    lowest = _LOWEST[kind]
    wrong = outcome.valid_rows(rollouts) & (reward != lowest) & (reward != 1.0)
    count = jnp.sum(wrong, dtype=reward.dtype)
    error = {f"error/reward is not {lowest:.0f} or 1": (count, jnp.ones_like(count))}
    return reward if kind == "signed" else 2.0 * reward - 1.0, error


@dataclasses.dataclass(frozen=True)
class _Raft:
    rewards: str

    def __call__(self, rollouts: Rollouts, state: RaftState) -> tuple[Array, Mapping[str, Array], Metrics, RaftState]:
        reward = outcome.total_reward(rollouts, state.reward_weights)
        signed, error = _signed(reward, rollouts, self.rewards)
        advantage = outcome.spread(jnp.maximum(signed, 0.0), rollouts)
        return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **error}, state


def raft(*, rewards: str = "signed", reward_weights: tuple[float, ...] | None = None) -> Estimator:
    """1 on all tokens of a correct response, 0 on those of a wrong one.

        A_i = max(R_i, 0)

    Wrong responses stay in the batch, so the denominator of a token mean counts their tokens: this is not supervised
    learning on a filtered set, whose steps would be larger. RAFT and RAFT++ share this advantage and differ in the
    surrogate: `surrogates.reinforce` (no ratio, no clip) is RAFT; `surrogates.dual_clip` after `clip_range` is RAFT++.
    Both `rewards` give the same advantages. A total reward other than their two numbers, in a valid row, stops a run.
    Rows with `row_data["is_valid"]` False get 0.

    Args:
      rewards: what a response's total reward is: `"signed"`, -1 or 1, or `"binary"`, 0 or 1.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: an option is unknown or, when traced, the number of weights is wrong.

    Reference: 2504.11343 (RAFT: 2304.06767); released code: RLHFlow/Minimal-RL.

    >>> raft(reward_weights=(1.0, 0.0)).estimate == raft().estimate
    True
    """
    require(rewards in _LOWEST, "rewards", rewards, "signed or binary")
    return Estimator(
        init=lambda weights=None: RaftState(outcome.weights_state(reward_weights, weights)), estimate=_Raft(rewards)
    )


@dataclasses.dataclass(frozen=True)
class _ReinforceRej:
    rewards: str
    singleton: str

    def __call__(self, rollouts: Rollouts, state: RaftState) -> tuple[Array, Mapping[str, Array], Metrics, RaftState]:
        group, valid = rollouts.group, outcome.valid_rows(rollouts)
        reward = outcome.total_reward(rollouts, state.reward_weights)
        signed, error = _signed(reward, rollouts, self.rewards)
        kept = ~stats.group_is_constant(reward, group, valid)
        if self.singleton == "raw":
            kept |= stats.group_count(group, valid) == 1
        advantage = outcome.spread(jnp.where(kept, signed, 0.0), rollouts)
        return advantage, {}, {**outcome.metrics(rollouts, reward, advantage), **error}, state


def reinforce_rej(
    *, rewards: str = "signed", singleton: str = "zero", reward_weights: tuple[float, ...] | None = None
) -> Estimator:
    """The raw reward, -1 or 1, and 0 in groups whose responses are all correct or all wrong.

        A_i = R_i 1[max_g R > min_g R]

    There is no baseline and no standard deviation. Groups left out stay in the batch, so the denominator of a token
    mean counts their tokens. The authors' script has no ratio: use `surrogates.reinforce`. Rewards of 0 and 1 are
    mapped to -1 and 1 (`rewards="binary"`); the released code takes them as they are, and then wrong responses have no
    gradient: it is RAFT on mixed groups. A total reward other than the two numbers, in a valid row, stops a run. Rows
    with `row_data["is_valid"]` False are not of the group and get 0.

    Args:
      rewards: what a response's total reward is: `"signed"`, -1 or 1, or `"binary"`, 0 or 1.
      singleton: advantage of a group of one valid row: `"zero"`, or `"raw"`: its reward, as in the released code.
      reward_weights: one number per reward column, None for the weights of the task's graders: the columns are summed
        first.

    Raises:
      ValueError: an option is unknown or, when traced, the number of weights is wrong.

    Reference: 2504.11343; released code: RLHFlow/Minimal-RL.

    >>> reinforce_rej(rewards="binary").min_group_size
    2
    """
    require(rewards in _LOWEST, "rewards", rewards, "signed or binary")
    require(singleton in ("zero", "raw"), "singleton", singleton, "zero or raw")
    return Estimator(
        init=lambda weights=None: RaftState(outcome.weights_state(reward_weights, weights)),
        estimate=_ReinforceRej(rewards, singleton),
        min_group_size=2 if singleton == "zero" else 1,
    )

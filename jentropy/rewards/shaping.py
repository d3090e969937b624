"""Overlong responses: a penalty by length, the reward column of it, and truncated rows without gradient."""

import dataclasses
import math
from collections.abc import Mapping

import chex
import jax.numpy as jnp

from jentropy.base import Array, Rollouts, require
from jentropy.rewards.base import DeviceReward


def _check(max_length: int, length_name: str, buffer_length: int, buffer_name: str, factor: float, name: str) -> None:
    require(max_length >= 1, length_name, max_length, "at least 1 token")
    in_range = 1 <= buffer_length <= max_length
    require(in_range, buffer_name, buffer_length, f"in (0, {length_name} = {max_length}] tokens")
    require(0.0 <= factor < math.inf, name, factor, "finite and at least 0")


def overlong_penalty(
    length: Array, *, max_length: int, buffer_length: int, penalty_factor: float = 1.0, floor: bool = True
) -> Array:
    """The soft punishment of long responses, to be added to the reward.

        0                                       n <= L_max - L_c
        f · ((L_max - L_c) - n) / L_c           in between
        -f                                      n > L_max

    Args:
      length: int, any shape, tokens of each response, its end of sequence included: n >= 0.
      max_length: L_max, the longest response, the buffer included; at least 1.
      buffer_length: L_c, the last tokens of it, over which the punishment grows; in (0, max_length].
      penalty_factor: f, the largest punishment; finite, at least 0. The paper and TRL have 1.
      floor: False lets the line go on beyond L_max, as verl's code does; no difference while responses are cut there.

    Returns:
      Float of the default precision and the shape of `length`, in [-f, 0] with the floor.

    Raises:
      ValueError: a number is out of range.

    Reference: DAPO, 2503.14476, eq. 13 (L_max 20480, L_c 4096).

    >>> [float(x) for x in overlong_penalty(jnp.array([80, 90, 100, 150]), max_length=100, buffer_length=20)]
    [0.0, -0.5, -1.0, -1.0]
    """
    _check(max_length, "max_length", buffer_length, "buffer_length", penalty_factor, "penalty_factor")
    chex.assert_type(length, int)
    left = ((max_length - buffer_length) - length).astype(jnp.result_type(float))
    share = jnp.minimum(left / buffer_length, 0.0)
    return penalty_factor * (jnp.maximum(share, -1.0) if floor else share)


@dataclasses.dataclass(frozen=True)
class _Overlong:
    max_length: int
    buffer_length: int
    penalty: float

    def __call__(self, tokens: Array, response_mask: Array, fields: Mapping[str, Array]) -> Array:
        del tokens, fields
        length = jnp.sum(response_mask, axis=1, dtype=jnp.int32)
        found = overlong_penalty(
            length, max_length=self.max_length, buffer_length=self.buffer_length, penalty_factor=self.penalty
        )
        return found.astype(jnp.float32)


def overlong_reward(
    *, max_length: int, overlong_buffer_length: int, overlong_buffer_penalty: float = 1.0
) -> DeviceReward:
    """`overlong_penalty` as a reward column of its own, named "overlong", for `Reinforce.shaping`.

    The column enters before group statistics: a group in which all answers are right, in different lengths, has
    advantages. Dynamic sampling does not look at it.

    Known as `get_soft_overlong_punishment(max_completion_len, soft_punish_cache)` (TRL) and
    `overlong_buffer.{len, penalty_factor}` (verl).

    Args:
      max_length: the longest response in tokens, usually the task's `max_new_tokens`.
      overlong_buffer_length: the last tokens of it, over which the punishment grows; in (0, max_length].
      overlong_buffer_penalty: the largest punishment; finite, at least 0.

    Raises:
      ValueError: a number is out of range.

    Reference: DAPO, 2503.14476, eq. 13.

    >>> overlong_reward(max_length=10, overlong_buffer_length=4).name
    'overlong'
    """
    _check(
        max_length, "max_length", overlong_buffer_length, "overlong_buffer_length", overlong_buffer_penalty,
        "overlong_buffer_penalty",
    )  # fmt: skip
    return DeviceReward("overlong", _Overlong(max_length, overlong_buffer_length, float(overlong_buffer_penalty)))


def mask_truncated(rollouts: Rollouts) -> Rollouts:
    """Overlong filtering: no token of a truncated row is in the loss mask; its reward stays in its group's baseline.

    So every quantile, covariance, count and denominator leaves these rows out. Their lengths are kept for reports, as
    `row_data["response_length"]` `[B]`. Known as `mask_truncated_completions` (TRL), which masks the row's attention
    as well; here only the loss.

    Args:
      rollouts: graded rows with `row_data["truncated"]` `[B]` bool.

    Raises:
      ValueError: the rows do not say which of them are truncated.

    Reference: DAPO, 2503.14476, section 3.4.
    """
    if "truncated" not in rollouts.row_data:
        raise ValueError("mask_truncated needs row_data['truncated']")
    length = jnp.sum(rollouts.loss_mask, axis=1, dtype=jnp.int32)
    return rollouts.replace(
        loss_mask=rollouts.loss_mask & ~rollouts.row_data["truncated"][:, None],
        row_data={**rollouts.row_data, "response_length": length},
    )

"""The two kinds of graders, and the checks around those that run on text."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jentropy import base


class RewardError(ValueError):
    """A grader that returned what is no reward, or that failed too often; names the function and the row."""


class RewardTypeError(RewardError, TypeError):
    """A grader that returned something of a wrong type."""


@dataclasses.dataclass(frozen=True)
class DeviceReward:
    """A grader of token arrays: pure, jit-able, runs inside the step.

    Attributes:
      name: what reports call it.
      function: `(tokens [B, T] int32, response_mask [B, T] bool, fields {name: [B]}) -> [B] float32`. The mask covers
        the response up to and including its end-of-sequence token.
      weight: factor of this reward in the sum of all.
    """

    name: str
    function: Callable[[base.Array, base.Array, Mapping[str, base.Array]], base.Array]
    weight: float = 1.0

    def __post_init__(self):
        base.require(math.isfinite(self.weight), "weight", self.weight, "finite")


@dataclasses.dataclass(frozen=True)
class TextReward:
    """A grader of text: a Python function on the host.

    Attributes:
      name: what reports call it.
      function: `(prompts, completions, **fields) -> one number or None per row`, all arguments lists of length B. None
        abstains: the row has no reward of this kind.
      weight: factor of this reward in the sum of all.
    """

    name: str
    function: Callable[..., Sequence[float | None]]
    weight: float = 1.0

    def __post_init__(self):
        base.require(math.isfinite(self.weight), "weight", self.weight, "finite")


Reward = DeviceReward | TextReward


def weights_of(rewards: Sequence[Reward]) -> tuple[float, ...] | None:
    """The weights of reward columns, None if all are 1."""
    weights = tuple(reward.weight for reward in rewards)
    return None if all(weight == 1.0 for weight in weights) else weights


def grade_text(
    reward: TextReward, prompts: list[str], completions: list[str], fields: Mapping[str, Sequence]
) -> tuple[np.ndarray, np.ndarray]:
    """Calls a text grader and checks what it returns.

    Args:
      reward: the grader.
      prompts: B texts.
      completions: B texts.
      fields: `[B]` arrays or lists by name, passed to the function as lists.

    Returns:
      values: `[B]` float32, 0 where the grader abstained.
      is_valid: `[B]` bool, False where it abstained.

    Raises:
      RewardTypeError: the function did not return a sequence of numbers and None; names it and the row.
      RewardError: wrong length, or a value that is not finite in float32; names the function and the row.
    """
    columns = {
        name: column.tolist() if isinstance(column, np.ndarray) else list(column) for name, column in fields.items()
    }
    graded = reward.function(prompts, completions, **columns)
    if not isinstance(graded, list | tuple | np.ndarray):
        raise RewardTypeError(f"reward {reward.name!r} must return a list, got {type(graded).__name__}")
    if len(graded) != len(completions):
        raise RewardError(f"reward {reward.name!r} returned {len(graded)} values for {len(completions)} rows")
    values = np.zeros(len(graded), np.float32)
    is_valid = np.asarray([value is not None for value in graded], bool)
    for row, value in enumerate(graded):
        if value is not None:
            values[row] = _checked(value, reward.name, row)
    return values, is_valid


def _checked(value: object, name: str, row: int) -> float:
    """A grader's value as a float, or an error that names the grader and the row."""
    if not isinstance(value, numbers.Real | np.bool_):
        raise RewardTypeError(
            f"reward {name!r} returned {type(value).__name__} {value!r} for row {row}, not a number or None"
        )
    try:
        number = float(value)
    except OverflowError:  # an integer too large for any float
        number = math.inf
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise RewardError(f"reward {name!r} returned {number!r} for row {row}, not finite in float32")
    return number

"""PPO's clip range and clip-higher: bounds of the ratio."""

from typing import NamedTuple

import jax.numpy as jnp

from jentropy.base import Array, Mechanism, Plan, Signals, hyper, require


class ClipRangeState(NamedTuple):
    """The bounds' distances from 1, scalars."""

    epsilon_low: Array
    epsilon_high: Array


def _update(plan: Plan, state: ClipRangeState, signals: Signals, key: Array) -> tuple[Plan, ClipRangeState]:
    del signals, key
    low = (1.0 - state.epsilon_low).astype(plan.ratio_low.dtype)
    high = (1.0 + state.epsilon_high).astype(plan.ratio_high.dtype)
    return plan.replace(
        ratio_low=jnp.full_like(plan.ratio_low, low), ratio_high=jnp.full_like(plan.ratio_high, high)
    ), state


def clip_range(*, epsilon_low: float = 0.2, epsilon_high: float | None = None) -> Mechanism:
    """Clips the ratio of every token to `[1 - epsilon_low, 1 + epsilon_high]`.

    `epsilon_high > epsilon_low` is clip-higher: unlikely tokens may grow further, which keeps entropy up (DAPO: 0.2 and
    0.28). Replaces the bounds that were there: put it first in the chain. Known as `epsilon`, `epsilon_high` (TRL) and
    `clip_ratio_low`, `clip_ratio_high` (verl).

    Args:
      epsilon_low: in [0, 1]; 1 is unclipped.
      epsilon_high: at least 0; inf is unclipped; None takes `epsilon_low`.

    Raises:
      ValueError: a value is out of range.

    Reference: 1707.06347, eq. 7; clip-higher: 2503.14476, eq. 10.

    >>> clip_range(epsilon_high=0.28).update == clip_range(epsilon_low=0.1).update
    True
    """
    if epsilon_high is None:
        epsilon_high = epsilon_low
    require(0.0 <= epsilon_low <= 1.0, "epsilon_low", epsilon_low, "in [0, 1]")
    require(epsilon_high >= 0.0, "epsilon_high", epsilon_high, "at least 0")
    return Mechanism(lambda: ClipRangeState(hyper(epsilon_low), hyper(epsilon_high)), _update)

"""How much of a run's entropy is spent, and of its reward gained, by fractions of its steps.

Reference: arXiv 2505.22617, section 2.3.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jentropy.regression import LawError, finite_vector


class Consumption(NamedTuple):
    """What a run has spent and gained by one moment.

    Attributes:
      fraction: of the run's steps.
      step: the moment, interpolated linearly between evaluations.
      entropy_fraction: (H_0 - H) / (H_0 - H_end).
      reward_fraction: (R - R_0) / (R_end - R_0).
    """

    fraction: float
    step: float
    entropy_fraction: float
    reward_fraction: float


def entropy_consumption(
    step: ArrayLike, entropy: ArrayLike, reward: ArrayLike, fractions: tuple[float, ...] = (1 / 12, 1 / 3)
) -> tuple[Consumption, ...]:
    """How much of a run's entropy is spent, and of its reward gained, after each fraction of its steps.

    The defaults are the paper's: 200 and 800 of 2400 steps, where it finds 73 % / 76 % and 93 % / 94 %.

    Args:
      step: `[n]`, increasing.
      entropy: `[n]`, H in nats.
      reward: `[n]`, R.
      fractions: of the steps from the first to the last, in [0, 1].

    Returns:
      One row per fraction.

    Raises:
      LawError: entropy did not fall or reward did not rise from the first point to the last: nothing was consumed.
    """
    step, entropy = finite_vector("step", step), finite_vector("entropy", entropy)
    reward = finite_vector("reward", reward)
    if not step.size == entropy.size == reward.size or step.size < 2 or not (np.diff(step) > 0).all():
        raise LawError("step, entropy and reward must have equal length, at least 2, and step must increase")
    for name, value in (("entropy", entropy), ("reward", reward)):
        if value[0] == value[-1]:
            raise LawError(f"{name} is {value[0]:g} at the first and the last point: nothing was consumed")
    if entropy[-1] > entropy[0]:
        raise LawError(f"entropy rises from {entropy[0]:.3g} to {entropy[-1]:.3g} nats: nothing was consumed")
    if reward[-1] < reward[0]:
        raise LawError(f"reward falls from {reward[0]:.3g} to {reward[-1]:.3g}: nothing was gained")
    rows = []
    for fraction in fractions:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fractions must be in [0, 1], got {fraction!r}")
        moment = step[0] + fraction * (step[-1] - step[0])
        spent = (entropy[0] - np.interp(moment, step, entropy)) / (entropy[0] - entropy[-1])
        gained = (np.interp(moment, step, reward) - reward[0]) / (reward[-1] - reward[0])
        rows.append(Consumption(fraction, float(moment), float(spent), float(gained)))
    return tuple(rows)

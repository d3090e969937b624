"""SHIFT with REINFORCE: the reward minus the mean of the whole rollout, no group and no ratio.

REINFORCE (Williams 1992; for language models 2402.14740) with the mean reward of the rollout as baseline, and the
score-function loss.

Command:  jentropy train experiments/configs/shift_reinforce.py --out runs/shift_reinforce
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy import surrogates
from jentropy.advantages.reinforce import reinforce
from jentropy.embedded import shift


def get_config() -> fdl.Config:
    """The experiment."""
    estimator = fdl.Config(reinforce, baseline="batch_mean")
    return shift("shift_reinforce", estimator=estimator, surrogate=surrogates.reinforce)

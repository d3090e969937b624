"""SHIFT with GDPO and two rewards: the correct answer, and a legal chain of running sums on the way to it.

GDPO (2601.05242) standardises each reward in its group before they are summed, weights 1:1; no number needs rescaling.
The second reward pays for chains before the shift too, where a shortcut is enough for the first: the shift is milder
than that of the configs with one reward, and their figures do not compare. `val/pass@1` is the rate of correct answers.

Command:  jentropy train experiments/configs/shift_gdpo.py --out runs/shift_gdpo
Hardware: two CPU cores. Cost: about two minutes; its warm start is not that of the configs with one reward.
"""

import fiddle as fdl

from jentropy.advantages.gdpo import gdpo
from jentropy.embedded import shift


def get_config() -> fdl.Config:
    """The experiment."""
    config = shift("shift_gdpo", estimator=fdl.Config(gdpo))
    config.task.reward = "device+chain"
    return config

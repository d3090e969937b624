"""SHIFT with RLOO: each reward against the mean of the other seven of its group.

RLOO (2402.14740) in the place of GRPO's advantage: 8/7 of the centred reward, not divided by a standard deviation.
The loss is GRPO's, a clipped ratio per token, so that only the estimator differs; the paper treats the response as
one action (`surrogates.sequence_ratio`). Nothing had to be rescaled.

Command:  jentropy train experiments/configs/shift_rloo.py --out runs/shift_rloo
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.rloo import rloo
from jentropy.embedded import shift


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_rloo", estimator=fdl.Config(rloo))

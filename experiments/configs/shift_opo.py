"""SHIFT with OPO: each reward against its group's mean, weighted by length.

OPO (2505.23585) in the place of GRPO's advantage. The paper makes one update per rollout, strictly on-policy; here
there are 2 x 2, with the ratio clipped at .2, so that only the estimator differs from plain GRPO. Nothing had to be
rescaled.

Command:  jentropy train experiments/configs/shift_opo.py --out runs/shift_opo
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.opo import opo
from jentropy.embedded import shift


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_opo", estimator=fdl.Config(opo))

"""SHIFT with REINFORCE++-baseline: rewards against their group, whitened over the rollout.

REINFORCE++-baseline (2501.03262) subtracts the mean of the 8 rewards of a prompt and whitens over all tokens of the
rollout. Nothing had to be rescaled. The divergence from the reference, which the paper adds to the loss, is left out,
as in all configs of this setting.

Command:  jentropy train experiments/configs/shift_reinforce_pp_baseline.py --out runs/shift_reinforce_pp_baseline
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.reinforce_pp import reinforce_pp_baseline
from jentropy.embedded import shift


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_reinforce_pp_baseline", estimator=fdl.Config(reinforce_pp_baseline))

"""LAW with Dr. GRPO: no standard deviation, and one length for all responses.

Dr. GRPO (2503.20783): the reward minus the group's mean, and token sums over one constant length. The length is that
of the longest response, 7 tokens here.

Command:  jentropy train experiments/configs/law_dr_grpo.py --out runs/law_dr_grpo
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.grpo import grpo
from jentropy.embedded import law
from jentropy.normalisers import fixed_length


def get_config() -> fdl.Config:
    """The experiment."""
    return law(
        "law_dr_grpo", estimator=fdl.Config(grpo, scale_rewards="none"), normaliser=fdl.Config(fixed_length, length=7)
    )

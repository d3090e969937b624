"""LAW with Reinforce-Rej: the raw reward on prompts that are neither solved nor lost.

Reinforce-Rej (2504.11343) gives 1 to correct and -1 to wrong responses of prompts that have both, and nothing to the
others; no baseline, no standard deviation, no ratio. Rewards are 0 and 1 here and are mapped to -1 and 1. Nothing had
to be rescaled.

Command:  jentropy train experiments/configs/law_reinforce_rej.py --out runs/law_reinforce_rej
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.raft import reinforce_rej
from jentropy.embedded import law
from jentropy.surrogates import reinforce


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_reinforce_rej", estimator=fdl.Config(reinforce_rej, rewards="binary"), surrogate=reinforce)

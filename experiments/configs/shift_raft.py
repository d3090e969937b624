"""SHIFT with RAFT: learning from correct responses only.

RAFT (2504.11343) as policy gradient: the advantage is 1 for a correct response and 0 for a wrong one, and the loss
has no ratio and no clip. Rewards are 0 and 1 here. Nothing had to be rescaled.

Command:  jentropy train experiments/configs/shift_raft.py --out runs/shift_raft
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.raft import raft
from jentropy.embedded import shift
from jentropy.surrogates import reinforce


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_raft", estimator=fdl.Config(raft, rewards="binary"), surrogate=reinforce)

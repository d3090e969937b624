"""LAW with RAFT++: learning from correct responses only, with a clipped ratio.

RAFT++ (2504.11343) is RAFT's advantage, 1 for a correct response and 0 for a wrong one, under PPO's ratio clipped at
.2 with a dual clip of 3, which does nothing where no advantage is negative. Rewards are 0 and 1 here. Nothing had to
be rescaled.

Command:  jentropy train experiments/configs/law_raft_pp.py --out runs/law_raft_pp
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.raft import raft
from jentropy.embedded import law
from jentropy.surrogates import dual_clip


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_raft_pp", estimator=fdl.Config(raft, rewards="binary"), surrogate=fdl.Config(dual_clip))

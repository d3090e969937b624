"""LAW with clip-higher: unlikely tokens may grow further within one rollout.

Clip-higher (DAPO, 2503.14476, eq. 10): the ratio is clipped to [0.8, 1.5] instead of [0.8, 1.2]. DAPO's upper bound is
1.28; with learning rates of this size it would hardly differ from 1.2.

Command:  jentropy train experiments/configs/law_clip_higher.py --out runs/law_clip_higher
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.mechanisms.clip_range import clip_range


def get_config() -> fdl.Config:
    """The experiment; a mechanism named `clip_range` takes the place of GRPO's own."""
    return law("law_clip_higher", {"clip_range": fdl.Config(clip_range, epsilon_high=0.5)})

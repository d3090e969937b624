"""SHIFT with STEER: tokens that would change the entropy most weigh less.

STEER (2510.10150), linear mapping, with the authors' bounds of the ratio, .2 and .28, and dual clip, 10. Their weights
lie in [.8, 1.2], over thousands of updates; here, with some hundred rollouts and most of the change of entropy in a
few tokens, in [.2, 1.2]. That number was not searched for.

Command:  jentropy train experiments/configs/shift_steer.py --out runs/shift_steer
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import shift
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.steer import steer
from jentropy.surrogates import dual_clip


def get_config() -> fdl.Config:
    """The experiment."""
    return shift(
        "shift_steer",
        {
            "clip_range": fdl.Config(clip_range, epsilon_low=0.2, epsilon_high=0.28),
            "steer": fdl.Config(steer, weight_min=0.2, weight_max=1.2),
        },
        surrogate=fdl.Config(dual_clip, clip_ratio_c=10.0),
    )

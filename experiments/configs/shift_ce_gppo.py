"""SHIFT with CE-GPPO: tokens that PPO clips keep a bounded gradient.

CE-GPPO (2509.20712) with the authors' numbers: bounds .2 and .28, β1 = .5, β2 = 1, dual clip 3. Nothing is rescaled:
all of them are about the ratio of one token. Few tokens are clipped here, so expect a small effect.

Command:  jentropy train experiments/configs/shift_ce_gppo.py --out runs/shift_ce_gppo
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import shift
from jentropy.mechanisms.ce_gppo import ce_gppo
from jentropy.mechanisms.clip_range import clip_range
from jentropy.surrogates import dual_clip


def get_config() -> fdl.Config:
    """The experiment."""
    return shift(
        "shift_ce_gppo",
        {
            "clip_range": fdl.Config(clip_range, epsilon_low=0.2, epsilon_high=0.28),
            "ce_gppo": fdl.Config(ce_gppo, beta1=0.5, beta2=1.0),
        },
        surrogate=fdl.Config(dual_clip, clip_ratio_c=3.0),
    )

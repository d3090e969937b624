"""SHIFT with CISPO: clipping bounds the weight of a token and never stops its gradient.

CISPO (2506.13585, section 3.1) with the weight cut off at 5, as its users do, and no lower bound. In PPO the tokens
whose probability has grown fastest lose their gradient; that they keep it here is the whole difference. Nothing had to
be rescaled: the bound is on the ratio of one token.

Command:  jentropy train experiments/configs/shift_cispo.py --out runs/shift_cispo
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import shift
from jentropy.surrogates import cispo


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_cispo", surrogate=fdl.Config(cispo, cap=5.0))

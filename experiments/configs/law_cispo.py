"""LAW with CISPO: clipping bounds the weight of a token and never stops its gradient.

CISPO (2506.13585, section 3.1) with the weight cut off at 5, as its users do, and no lower bound. In PPO the tokens
whose probability has grown fastest lose their gradient; that they keep it here is the whole difference. Nothing had to
be rescaled: the bound is on the ratio of one token.

Command:  jentropy train experiments/configs/law_cispo.py --out runs/law_cispo
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.surrogates import cispo


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_cispo", surrogate=fdl.Config(cispo, cap=5.0))

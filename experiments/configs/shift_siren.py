"""SHIFT with SIREN: the entropy of likely tokens at the peaks of each response is held where it started.

SIREN (2509.25133), with the paper's definitions of nucleus and peak. Rescaled, as a response has three to seven tokens
and the learning rate is several hundred times the paper's: the peaks are the upper .4 of a response instead of the
upper .2, which would be one token, the nucleus holds .9 instead of .8 of some 16 ids, and the coefficient is .1 instead
of .005. The target is that of the first update of each stage.

Command:  jentropy train experiments/configs/shift_siren.py --out runs/shift_siren
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import shift
from jentropy.mechanisms.siren import siren


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_siren", {"siren": fdl.Config(siren, top_p=0.9, tau=0.6, beta=0.1)})

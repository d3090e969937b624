"""SHIFT with FR3E: new responses from the tokens at which the policy is most uncertain.

FR3E (2507.07017), rescaled as in law_fr3e: one base trajectory of each of 16 prompts, two anchors, 8 rows per state.
Before the shift most responses have three tokens, of which one may be an anchor: about half of the forks are padding.

Command:  jentropy train experiments/configs/shift_fr3e.py --out runs/shift_fr3e
Hardware: two CPU cores. Cost: about five minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import scaled_fr3e, shift


def get_config() -> fdl.Config:
    """The experiment."""
    return scaled_fr3e(shift, "shift_fr3e")

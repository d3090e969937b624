"""SHIFT with VinePPO: what each step has added to the value of the response, from responses sampled in between.

VinePPO (2410.01679), rescaled as in law_vine: every token is a step, 4 responses from each state, not 9.

Command:  jentropy train experiments/configs/shift_vine.py --out runs/shift_vine
Hardware: two CPU cores. Cost: about ten minutes; all shift_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import scaled_vine, shift


def get_config() -> fdl.Config:
    """The experiment."""
    return scaled_vine(shift, "shift_vine")

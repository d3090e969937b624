"""Preferences with H-DPO at α = 0.8: sharper than DPO.

H-DPO (2411.07595) on pairs of a right chain and one with a wrong step, from the warm start of LAW. An α below 1
makes the policy sharper than DPO would; .8 is the lowest of the paper's range. β is .5, since responses have 3 to 7
tokens. The two of a pair are equally long, so α sees no length.

Command:  jentropy train experiments/configs/h_dpo_sharp.py --out runs/h_dpo_sharp
Hardware: two CPU cores. Cost: less than that of a law_* run, with which it shares its warm start.
"""

import fiddle as fdl

from jentropy.embedded import preferences


def get_config() -> fdl.Config:
    """The experiment."""
    return preferences("h_dpo_sharp", alpha=0.8)

"""Preferences with H-DPO at α = 1: DPO.

H-DPO (2411.07595) on pairs of a right chain and one with a wrong step, from the warm start of LAW. An α of 1
is DPO, what h_dpo_sharp and h_dpo_flat compare with. β is .5, since responses have 3 to 7 tokens.

Command:  jentropy train experiments/configs/h_dpo_one.py --out runs/h_dpo_one
Hardware: two CPU cores. Cost: less than that of a law_* run, with which it shares its warm start.
"""

import fiddle as fdl

from jentropy.embedded import preferences


def get_config() -> fdl.Config:
    """The experiment."""
    return preferences("h_dpo_one", alpha=1.0)

"""SHIFT with entropy-shaped advantages: uncertain tokens get a bounded bonus.

The bonus of 2506.14758 on GRPO's advantages, with the paper's α = .4 and κ = 2. Nothing is rescaled: advantages of
groups and entropies of tokens are of the same order here as in the paper.

Command:  jentropy train experiments/configs/shift_entropy_advantage.py --out runs/shift_entropy_advantage
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs of one reward share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import shift
from jentropy.mechanisms.entropy_advantage import entropy_advantage


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_entropy_advantage", {"entropy_advantage": fdl.Config(entropy_advantage)})

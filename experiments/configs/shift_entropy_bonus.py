"""SHIFT with an entropy bonus: every token is paid for the entropy of its distribution.

The bonus of A3C (1602.01783) with a fixed coefficient of .03, added to GRPO with a clip range. 2505.22617 (section 4)
finds it hard to tune for a large vocabulary; this one has 16 tokens.

Command:  jentropy train experiments/configs/shift_entropy_bonus.py --out runs/shift_entropy_bonus
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
Expected: entropy .25 nats before the shift, reward .9 ten rollouts after it (experiments/results/ablation.md).
"""

import fiddle as fdl

from jentropy.embedded import scaled_entropy_bonus, shift


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_entropy_bonus", {"entropy_bonus": scaled_entropy_bonus()})

"""LAW with an entropy bonus: every token is paid for the entropy of its distribution.

The bonus of A3C (1602.01783) with a fixed coefficient of .03, added to GRPO with a clip range. 2505.22617 (section 4)
finds it hard to tune for a large vocabulary; this one has 16 tokens.

Command:  jentropy train experiments/configs/law_entropy_bonus.py --out runs/law_entropy_bonus
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law, scaled_entropy_bonus


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_entropy_bonus", {"entropy_bonus": scaled_entropy_bonus()})

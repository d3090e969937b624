"""SHIFT with a guard on the entropy: a band of its own, and nothing done while the entropy is inside.

The controller of Skywork-OR1 (2505.22312) made into a guard with two sides, after GRPO's clip range. The band is .2 to
.8 nats: its floor is somewhat below the .25 that a fixed bonus of .03 holds (experiments/results/ablation.md).
A run has some hundred rollouts instead of thousands, at several hundred times the learning rate: the step is 5e-3
instead of 1e-4 and the bound 5e-2 instead of 5e-3, as for adaptive_entropy.

Command:  jentropy train experiments/configs/shift_entropy_band.py --out runs/shift_entropy_band
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs of one reward share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import shift
from jentropy.mechanisms.entropy_band import entropy_band


def get_config() -> fdl.Config:
    """The experiment."""
    return shift(
        "shift_entropy_band",
        {
            "entropy_band": fdl.Config(
                entropy_band, entropy_low=0.2, entropy_high=0.8, entropy_coef_delta=5e-3, entropy_coef_max=5e-2
            )
        },
    )

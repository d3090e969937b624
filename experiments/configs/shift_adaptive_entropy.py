"""SHIFT with an adaptive entropy coefficient: a controller holds the entropy at a target.

Skywork-OR1's controller (2505.22312) after GRPO's clip range. Its target is .2 nats; here it is .3, somewhat
above the .25 that a fixed bonus of .03 holds (experiments/results/ablation.md).
A run has some hundred rollouts instead of thousands, at several hundred times the learning rate: the step is 5e-3
instead of 1e-4 and the maximum 5e-2 instead of 5e-3, beyond which the coefficient winds up against the reward.

Command:  jentropy train experiments/configs/shift_adaptive_entropy.py --out runs/shift_adaptive_entropy
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs of one reward share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import shift
from jentropy.mechanisms.adaptive_entropy import adaptive_entropy


def get_config() -> fdl.Config:
    """The experiment."""
    return shift(
        "shift_adaptive_entropy",
        {
            "adaptive_entropy": fdl.Config(
                adaptive_entropy, entropy_target=0.3, entropy_coef_delta=5e-3, entropy_coef_max=5e-2
            )
        },
    )

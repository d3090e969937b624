"""LAW with a guard on the entropy: a band of its own, and nothing done while the entropy is inside.

The controller of Skywork-OR1 (2505.22312) made into a guard with two sides, after GRPO's clip range. The band is .3 to
.9 nats, around the .75 that the warm start has: the run spends its entropy as it likes down to .3, where the guard
begins to act.
A run has some hundred rollouts instead of thousands, at several hundred times the learning rate: the step is 5e-3
instead of 1e-4 and the bound 5e-2 instead of 5e-3, as for adaptive_entropy.

Command:  jentropy train experiments/configs/law_entropy_band.py --out runs/law_entropy_band
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.mechanisms.entropy_band import entropy_band


def get_config() -> fdl.Config:
    """The experiment."""
    return law(
        "law_entropy_band",
        {
            "entropy_band": fdl.Config(
                entropy_band, entropy_low=0.3, entropy_high=0.9, entropy_coef_delta=5e-3, entropy_coef_max=5e-2
            )
        },
    )

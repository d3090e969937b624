"""SHIFT with plain GRPO: can a policy still adapt after its entropy is spent?

The baseline of the SHIFT setting: GRPO (2402.03300) with the ratio clipped at 0.2. 200 rollouts on two-digit prompts,
where a shortcut is enough, then 100 on prompts of up to six digits, where only step-by-step responses are rewarded.
That collapsed entropy costs later learning is the claim of 2505.22617 (section 2) that the setting examines.

Command:  jentropy train experiments/configs/shift_grpo.py --out runs/shift_grpo
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
Expected: entropy .02 nats before the shift, reward .9 forty rollouts after it (experiments/results/ablation.md).
"""

import fiddle as fdl

from jentropy.embedded import shift


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_grpo")

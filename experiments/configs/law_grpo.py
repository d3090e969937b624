"""LAW: plain GRPO spends all entropy for reward, along R = -a exp(H) + b.

Reproduces on a small scale the collapse and the law of 2505.22617 (section 2), with GRPO (2402.03300): warm start in
which both strategies of chained addition are likely, then 100 rollouts of 32 prompts x 8 responses, 2 x 2 updates each.

Command:  jentropy train experiments/configs/law_grpo.py --out runs/law_grpo
Hardware: two CPU cores. Cost: about two minutes, of which half go to the warm start and to compilation, once each.
Expected: held-out reward .42 -> .98, entropy .75 -> .03 nats, R² .986 (experiments/results/law.md).
"""

import fiddle as fdl

from jentropy.embedded import law


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_grpo")

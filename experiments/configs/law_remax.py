"""LAW with ReMax: each reward against that of the greedy response.

ReMax (2310.10505) costs one more response per prompt, 32 in a rollout of 256. The paper takes one sample per prompt;
here there are 8 samples and 2 x 2 updates with the ratio clipped at .2, as in plain GRPO, so that only the estimator
differs. Nothing had to be rescaled.

Command:  jentropy train experiments/configs/law_remax.py --out runs/law_remax
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.remax import remax
from jentropy.embedded import law


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_remax", estimator=fdl.Config(remax))

"""LAW with GDPO and two rewards: the correct answer, and a legal chain of running sums on the way to it.

GDPO (2601.05242) standardises each reward in its group before they are summed. No number needs rescaling: the weights
are 1:1 and the batch of the last normalisation is the rollout, 256 responses. `val/pass@1` is the rate of correct
answers, `val/reward/mean@8` adds that of legal chains. The same with GRPO on the sum: experiments/reward_collapse.py.

Command:  jentropy train experiments/configs/law_gdpo.py --out runs/law_gdpo
Hardware: two CPU cores. Cost: about two minutes, of which half go to the warm start and to compilation, once each.
"""

import fiddle as fdl

from jentropy.advantages.gdpo import gdpo
from jentropy.embedded import law


def get_config() -> fdl.Config:
    """The experiment."""
    config = law("law_gdpo", estimator=fdl.Config(gdpo))
    config.task.reward = "device+chain"
    return config

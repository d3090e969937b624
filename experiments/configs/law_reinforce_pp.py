"""LAW with REINFORCE++: rewards whitened over the whole rollout, prompts not compared with themselves.

REINFORCE++ (2501.03262) whitens over the tokens of the 256 responses of a rollout; the ratio is clipped at .2.
Nothing had to be rescaled. The divergence from the reference, which the paper puts into the reward, is left out, as
in all configs of this setting.

Command:  jentropy train experiments/configs/law_reinforce_pp.py --out runs/law_reinforce_pp
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.reinforce_pp import reinforce_pp
from jentropy.embedded import law


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_reinforce_pp", estimator=fdl.Config(reinforce_pp))

"""LAW with importance correction: the loss weighted by the trainer's against the sampler's probability.

Importance weights of tokens, truncated at 2 (IcePop, 2510.18855, masks them instead). In the embedded task sampler and
trainer run the same model and differ by less than 1e-5 nats, so all weights are close to 1 and the run should go as
plain GRPO's does: that the correction does no harm where it is not needed. With a sampler of its own, such as a
quantised one, it is the config to start from. Nothing is rescaled.

Command:  jentropy train experiments/configs/law_importance_correction.py --out runs/law_importance_correction
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.mechanisms.importance_correction import importance_correction


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_importance_correction", {"importance_correction": fdl.Config(importance_correction)})

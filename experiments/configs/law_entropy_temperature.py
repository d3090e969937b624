"""LAW with a higher temperature where the policy is uncertain.

Tokens of at least .3 nats are drawn at temperature 1.3, the others at 1, and trained at the temperature they were drawn
with. 2506.01939 analyses decoding with two temperatures and a quantile of the entropies as threshold, and does not
train with it. Rescaled: a quantile over responses of seven tokens would be the answer digits of hard prompts alone, so
the threshold is a number of nats, below ln 2, the entropy of two equal strategies.

Command:  jentropy train experiments/configs/law_entropy_temperature.py --out runs/law_entropy_temperature
Hardware: two CPU cores. Cost: about one minute; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.samplers import entropy_temperature


def get_config() -> fdl.Config:
    """The experiment."""
    config = law("law_entropy_temperature")
    for stage in config.stages[1:]:
        stage.sampler = fdl.Config(entropy_temperature, high=1.3, low=1.0, threshold=0.3)
    return config

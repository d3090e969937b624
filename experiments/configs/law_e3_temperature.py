"""LAW with E3's temperature: one for all tokens, steered towards the entropy of the first rollout.

E3 (2505.18573): T <- T (1 + T ln(H* / H) / (ln V + ln ln V)), with H* the entropy of the stage's first rollout.
Rescaled by the vocabulary alone: its 16 tokens make the controller four times as quick as the paper's 150,000 do. The
bounds of the temperature, .5 and 2, are ours. Entropies of training are at the temperature of sampling; evaluations are
at temperature 1.

Command:  jentropy train experiments/configs/law_e3_temperature.py --out runs/law_e3_temperature
Hardware: two CPU cores. Cost: about one minute; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.samplers import e3_temperature


def get_config() -> fdl.Config:
    """The experiment."""
    config = law("law_e3_temperature")
    for stage in config.stages[1:]:
        stage.sampler = fdl.Config(e3_temperature, vocab_size=16)
    return config

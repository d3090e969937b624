"""LAW with top-entropy: only the tokens of highest entropy are learned from.

The rule of 2506.01939 after GRPO's clip range: selected over the whole update, divided by all tokens. The paper's
fraction is .2; a response has three to seven tokens here, so that .2 of them are one or two: fraction .5.

Command:  jentropy train experiments/configs/law_top_entropy.py --out runs/law_top_entropy
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.mechanisms.top_entropy import top_entropy


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_top_entropy", {"top_entropy": fdl.Config(top_entropy, top_entropy_quantile=0.5)})

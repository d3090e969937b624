"""LAW with VinePPO: what each step has added to the value of the response, from responses sampled in between.

VinePPO (2410.01679). Every token of a chain is a step: the states before it are valued by 4 responses from each,
9 in the paper, whose steps are lines of text. Advantages are whitened over the batch, the ratio is clipped at .2, and
there is no divergence from a reference. A rollout of 256 responses samples some thousand more to value its states,
which are short and share many prefixes.

Command:  jentropy train experiments/configs/law_vine.py --out runs/law_vine
Hardware: two CPU cores. Cost: about four minutes, without the warm start that all law_* configs share.
"""

import fiddle as fdl

from jentropy.embedded import law, scaled_vine


def get_config() -> fdl.Config:
    """The experiment."""
    return scaled_vine(law, "law_vine")

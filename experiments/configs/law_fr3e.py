"""LAW with FR3E: new responses from the tokens at which the policy is most uncertain.

FR3E (2507.07017): of each prompt the first response is forked at its two tokens of largest entropy, 8 rows from each,
and the advantage within a state is scaled by exp(-ΔV). The paper has four anchors in responses of thousands of tokens,
here a response has 3 to 7: two anchors. So that a rollout has about as many rows as with GRPO, it has 16 prompts, not
32: 16 x (1 + 2) states x 8 rows = 384, of which some are padding where a response is too short. The ratio is clipped
at .2 and .28, as in the paper.

Command:  jentropy train experiments/configs/law_fr3e.py --out runs/law_fr3e
Hardware: two CPU cores. Cost: about two minutes, without the warm start that all law_* configs share.
"""

import fiddle as fdl

from jentropy.embedded import law, scaled_fr3e


def get_config() -> fdl.Config:
    """The experiment."""
    return scaled_fr3e(law, "law_fr3e")

"""LAW with S-GRPO: of the right answers at the exits of one thought, the earlier ones earn more.

S-GRPO (2505.07686) on chained addition with exits: demonstrations go on thinking for 2 to 6 tokens after the result is
there. One response to each of 64 prompts, and three answers asked for at random places of its thought: 256 rows, those
of thoughts that do not end being padding. The reward halves with each right answer of the group; responses are weighted
alike, and there is no standard deviation. The paper has some eight exits in thoughts of thousands of tokens.

Command:  jentropy train experiments/configs/law_s_grpo.py --out runs/law_s_grpo
Hardware: two CPU cores. Cost: about five minutes with a warm start of its own.
"""

import fiddle as fdl

from jentropy.embedded import scaled_s_grpo


def get_config() -> fdl.Config:
    """The experiment."""
    return scaled_s_grpo("law_s_grpo")

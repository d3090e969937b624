"""LAW with Seed-GRPO: prompts whose answers disagree are learned from more carefully.

The factor of 2505.12346 on the advantages R - mean R, which the paper does not divide by the standard deviation, with
the entropy of the counts of answers in each group of eight. α = .5 halves the advantages of a group without two equal
answers; the paper's own value was not at hand.

Command:  jentropy train experiments/configs/law_semantic_entropy.py --out runs/law_semantic_entropy
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.grpo import grpo
from jentropy.embedded import law
from jentropy.mechanisms.semantic_entropy import semantic_entropy


def get_config() -> fdl.Config:
    """The experiment."""
    return law(
        "law_semantic_entropy",
        {"semantic_entropy": fdl.Config(semantic_entropy, semantic_entropy_alpha=0.5)},
        estimator=fdl.Config(grpo, scale_rewards="none"),
    )

"""LAW with GSPO: the ratio of the whole response is clipped, not that of each token.

GSPO (2507.18071, section 4) with its average over responses. The paper's bounds, 3e-4 and 4e-4, are for responses of
thousands of tokens, over which the log-ratio averages out. Here a response has three to seven tokens and its mean
log-ratio moves almost as a token's does, so the bounds are .04 and .04. (In a trial .05 clipped 30 % of the tokens of
the first rollout and 2 to 12 % of those of the next nine.)

Command:  jentropy train experiments/configs/law_gspo.py --out runs/law_gspo
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.mechanisms.clip_range import clip_range
from jentropy.normalisers import sequence_mean_token_mean
from jentropy.surrogates import gspo


def get_config() -> fdl.Config:
    """The experiment."""
    return law(
        "law_gspo",
        {"clip_range": fdl.Config(clip_range, epsilon_low=0.04, epsilon_high=0.04)},
        surrogate=fdl.Config(gspo),
        normaliser=sequence_mean_token_mean,
    )

"""LAW with Clip-Cov: no gradient from a few tokens of large covariance.

Clip-Cov (2505.22617, section 4.2) after GRPO's clip range. The paper's fraction, 2e-4, would select less than one of
the some 500 tokens of an update, and its band of covariances, (1, 5), misses the largest ones here: fraction .03, band
(1, 50).

Command:  jentropy train experiments/configs/law_clip_cov.py --out runs/law_clip_cov
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law, scaled_clip_cov


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_clip_cov", {"clip_cov": scaled_clip_cov()})

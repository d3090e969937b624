"""SHIFT with Clip-Cov: no gradient from a few tokens of large covariance.

Clip-Cov (2505.22617, section 4.2) after GRPO's clip range. The paper's fraction, 2e-4, would select less than one of
the some 500 tokens of an update, and its band of covariances, (1, 5), misses the largest ones here: fraction .03, band
(1, 50).

Command:  jentropy train experiments/configs/shift_clip_cov.py --out runs/shift_clip_cov
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs share one warm start.
Expected: entropy .26 nats before the shift, reward .9 twenty rollouts after it (experiments/results/ablation.md).
"""

import fiddle as fdl

from jentropy.embedded import scaled_clip_cov, shift


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_clip_cov", {"clip_cov": scaled_clip_cov()})

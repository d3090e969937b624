"""SHIFT with QAE: rewards against a quantile of their group instead of its mean.

QAE (2509.22611) in place of GRPO's advantage, K = .4 as in the authors' scripts: up to 4 right answers of 8
only the right ones count, from 5 on only the wrong ones. No number needs rescaling for a small batch. The released code
interpolates the quantile and divides by the standard deviation: `baseline="linear"`, `scale_rewards="group"`.

Command:  jentropy train experiments/configs/shift_qae.py --out runs/shift_qae
Hardware: two CPU cores. Cost: about two minutes; all shift_* configs of one reward share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.qae import qae
from jentropy.embedded import shift


def get_config() -> fdl.Config:
    """The experiment."""
    return shift("shift_qae", estimator=fdl.Config(qae, quantile_k=0.4))

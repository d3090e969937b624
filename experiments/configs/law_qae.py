"""LAW with QAE: does a quantile as baseline leave the line R = -a exp(H) + b?

QAE (2509.22611) in place of GRPO's advantage, K = .4 as in the authors' scripts. No number needs rescaling
for a small batch; advantages are -1, 0 or 1, not divided by a standard deviation, and many are 0.

Command:  jentropy train experiments/configs/law_qae.py --out runs/law_qae
Hardware: two CPU cores. Cost: about two minutes, of which half go to the warm start and to compilation, once each.
"""

import fiddle as fdl

from jentropy.advantages.qae import qae
from jentropy.embedded import law


def get_config() -> fdl.Config:
    """The experiment."""
    return law("law_qae", estimator=fdl.Config(qae, quantile_k=0.4))

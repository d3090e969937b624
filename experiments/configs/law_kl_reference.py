"""LAW with a divergence from the reference: the policy is held near the parameters that the stage began with.

The divergence of GRPO (2402.03300, eq. 4) with the estimator k2, whose gradient is that of D_KL(π || π_ref), and a
coefficient of .04, which is that paper's. The reference is the policy at the start of each stage, so after a shift of
the task it is what was learned before it.

Command:  jentropy train experiments/configs/law_kl_reference.py --out runs/law_kl_reference
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.mechanisms.kl_reference import kl_reference


def get_config() -> fdl.Config:
    """The experiment."""
    config = law("law_kl_reference", {"kl_reference": fdl.Config(kl_reference, beta=0.04, estimator="k2")})
    for stage in config.stages[1:]:
        stage.reference = True
    return config

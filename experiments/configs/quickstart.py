"""The first run of the quickstart: the LAW setting with plain GRPO.

`jentropy quickstart` makes four runs, those of `jentropy.embedded.quickstart()`: this one (the collapse and the law
R = -a exp(H) + b of 2505.22617), then shift_grpo, shift_clip_cov and shift_entropy_bonus from one warm start, and sums
them up in one table and one picture. A config is one run, so this file gives the first. The files of these four names
beside it are the same experiments; here each chain holds all methods, those not used at their neutral setting, so that
the four runs share one compiled step.

Command:  jentropy train experiments/configs/quickstart.py --out runs/quickstart
          jentropy quickstart --out runs/quickstart_all
Hardware: two CPU cores. Cost: about two minutes for this run, about five for all four.
"""

import fiddle as fdl

from jentropy import embedded


def get_config() -> fdl.Config:
    """The experiment."""
    return embedded.quickstart()["law_grpo"]

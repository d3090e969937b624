"""LAW with the entropy ledger: what every rollout's updates did to the entropy, beside what theory says they do.

Plain GRPO (2402.03300) in the LAW setting. Of every step the measured change of the entropy, Lemma 1 of 2505.22617 and
the covariances, in parts; of every tenth also the first-order prediction in the parameters.

Command:  jentropy train experiments/configs/law_ledger.py --out runs/law_ledger
Hardware: two CPU cores. Cost: about two minutes, as law_grpo.
Expected: `ledger.jsonl` with 100 lines; the runs are those of law_grpo up to rounding.
"""

import fiddle as fdl

from jentropy.embedded import law
from jentropy.train.ledger import Ledger


def get_config() -> fdl.Config:
    """The experiment."""
    config = law("law_ledger")
    config.stages[1].ledger = fdl.Config(Ledger, every=1, first_order_every=10)
    return config

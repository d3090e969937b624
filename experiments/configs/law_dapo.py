"""LAW with DAPO whole: clip-higher, token-level loss, dynamic sampling, overlong filtering and shaping.

DAPO (2503.14476): the ratio is clipped to [0.8, 1.28] and, as in its scripts, the loss of a negative advantage bounded
at 10; the loss is a mean over tokens; groups that are all right or all wrong are replaced by others. Rescaled for
seven tokens and 32 prompts: towards the end nearly all groups are all right, so there are at most 4 rounds a rollout,
and places still free are padded, where the paper samples on; a right chain of six digits has all 7 tokens, so the
overlong buffer is the last one, and costs .1 instead of 1. Rewards of evaluations are without it.

Command:  jentropy train experiments/configs/law_dapo.py --out runs/law_dapo
Hardware: two CPU cores. Cost: about two minutes; all law_* configs share one warm start.
Expected: held-out reward .42 -> .99, entropy .75 -> .01 nats (one run).
"""

import fiddle as fdl

from jentropy.embedded import law, scaled_dapo


def get_config() -> fdl.Config:
    """The experiment."""
    return scaled_dapo(law, "law_dapo")

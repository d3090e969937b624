"""SHIFT with PRIME: rewards per token from a second model that learns from outcomes alone.

PRIME (2502.01456): the implicit reward is β log(π_φ / π_ref) per token, both copies of the policy after its warm start;
φ is fitted to the outcomes by cross-entropy in one update a rollout at 5e-4, the policy's rate (the paper's is 1e-6,
twice its policy's). β is .3 instead of .05: responses have some 5 tokens, not thousands, over which log-ratios add up.
The baseline is the paper's, each response left out of its own.

Command:  jentropy train experiments/configs/shift_prime.py --out runs/shift_prime
Hardware: two CPU cores. Cost: about three minutes; all shift_* configs of one reward share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.prime import prime
from jentropy.embedded import shift
from jentropy.train.optimizer import AdamW
from jentropy.train.second_models import ImplicitReward


def get_config() -> fdl.Config:
    """The experiment."""
    config = shift("shift_prime", estimator=fdl.Config(prime))
    for stage in config.stages[1:]:
        optimizer = fdl.Config(AdamW, learning_rate=5e-4)
        stage.learners = {"implicit_reward": fdl.Config(ImplicitReward, optimizer=optimizer, beta=0.3)}
    return config

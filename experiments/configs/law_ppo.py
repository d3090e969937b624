"""LAW with PPO: a critic instead of groups, advantages by GAE.

PPO (1707.06347) with generalised advantages (1506.02438): γ 1, λ .95, whitened over the tokens of a rollout. The critic
has the policy's shape, begins as a copy of it with a head of zeros, and is fitted in 2 x 2 updates a rollout at 4e-4,
twice the policy's rate: a run has some hundred rollouts, in which its values must become useful. The divergence from
the reference, which PPO for language models puts into the reward, is left out, as in all configs of this setting.

Command:  jentropy train experiments/configs/law_ppo.py --out runs/law_ppo
Hardware: two CPU cores. Cost: about three minutes; all law_* configs share one warm start.
"""

import fiddle as fdl

from jentropy.advantages.gae import gae
from jentropy.embedded import law
from jentropy.train.optimizer import AdamW
from jentropy.train.second_models import Critic


def get_config() -> fdl.Config:
    """The experiment."""
    config = law("law_ppo", estimator=fdl.Config(gae, lam=0.95))
    for stage in config.stages[1:]:
        stage.learners = {"critic": fdl.Config(Critic, optimizer=fdl.Config(AdamW, learning_rate=4e-4))}
    return config

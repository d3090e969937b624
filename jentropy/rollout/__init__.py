"""Rollouts: from prompts and a policy to sampled responses."""

from jentropy.rollout.sampler import Samples as Samples
from jentropy.rollout.sampler import sample as sample

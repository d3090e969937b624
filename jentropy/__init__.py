"""jentropy: policy entropy in reinforcement learning with verifiable rewards, in pure JAX.

The public door. `jentropy.base` has the types and is the file to read first.
"""

from jentropy.advantages.grpo import grpo as grpo
from jentropy.advantages.rloo import rloo as rloo
from jentropy.base import ENTROPY as ENTROPY
from jentropy.base import LOG_PROB as LOG_PROB
from jentropy.base import Estimator as Estimator
from jentropy.base import Learner as Learner
from jentropy.base import Mechanism as Mechanism
from jentropy.base import Objective as Objective
from jentropy.base import Output as Output
from jentropy.base import Plan as Plan
from jentropy.base import Policy as Policy
from jentropy.base import Rollouts as Rollouts
from jentropy.base import Signals as Signals
from jentropy.base import initial_plan as initial_plan
from jentropy.compose import blockwise as blockwise
from jentropy.compose import blockwise_normaliser as blockwise_normaliser
from jentropy.compose import chain as chain
from jentropy.compose import penalty as penalty
from jentropy.compose import quantity as quantity
from jentropy.compose import stateless as stateless
from jentropy.head import linear_scores as linear_scores
from jentropy.head import pair_scores as pair_scores
from jentropy.mechanisms.clip_cov import clip_cov as clip_cov
from jentropy.mechanisms.clip_range import clip_range as clip_range
from jentropy.mechanisms.entropy_bonus import entropy_bonus as entropy_bonus
from jentropy.mechanisms.kl_cov import kl_cov as kl_cov
from jentropy.mechanisms.kl_reference import kl_reference as kl_reference
from jentropy.normalisers import fixed_length as fixed_length
from jentropy.normalisers import sequence_mean_token_mean as sequence_mean_token_mean
from jentropy.normalisers import sequence_mean_token_sum as sequence_mean_token_sum
from jentropy.normalisers import token_mean as token_mean
from jentropy.normalisers import token_sum as token_sum

"""Entropy-shaped advantages: a bounded bonus on the advantage of uncertain tokens."""

from typing import NamedTuple

import jax.numpy as jnp

from jentropy import stats
from jentropy.base import ENTROPY, Array, Mechanism, Plan, Signals, hyper, require


class EntropyAdvantageState(NamedTuple):
    """The scale of the entropy and the divisor of the advantage, scalars."""

    entropy_adv_alpha: Array
    entropy_adv_kappa: Array


def _update(
    plan: Plan, state: EntropyAdvantageState, signals: Signals, key: Array
) -> tuple[Plan, EntropyAdvantageState]:
    del key
    mask, advantage = signals.batch.loss_mask, plan.advantage
    alpha, kappa = (x.astype(advantage.dtype) for x in state)
    used = mask & (advantage != 0.0)
    entropy = jnp.where(used, signals.scores["entropy"], 0.0)
    limit = jnp.where(used, jnp.abs(advantage), 0.0) / kappa
    bonus = jnp.minimum(alpha * entropy, limit)
    plan = plan.replace(advantage=jnp.where(used, advantage + bonus, advantage))
    plan = plan.report(
        entropy_advantage__bonus=(jnp.sum(bonus), jnp.sum(mask, dtype=bonus.dtype)),
        entropy_advantage__limited_fraction=(
            stats.masked_sum((alpha * entropy >= limit).astype(bonus.dtype), used),
            jnp.sum(used, dtype=bonus.dtype),
        ),
    )
    return plan, state


def entropy_advantage(*, entropy_adv_alpha: float = 0.4, entropy_adv_kappa: float = 2.0) -> Mechanism:
    """Adds to each token's advantage a bonus that grows with its entropy, up to a part of the advantage itself.

        A'_t = A_t + min(α H_t, |A_t| / κ)

    H is the entropy of the current policy over the whole vocabulary, without gradient. Tokens with A = 0 keep exactly
    0. No sign flips, as κ >= 1; with κ = 1 a negative advantage may become 0. The bonus raises negative advantages too:
    it softens the penalty on uncertain tokens. Put it before mechanisms that read the advantage, such as `clip_cov`.

    The released code of another paper (2509.25133) has κ = 1, and adds in place, so that its bonus grows with every
    epoch over the same rollout; here it is added once per update, to the estimator's advantage.

    Args:
      entropy_adv_alpha: α, finite and at least 0; 0 is the identity. The paper has .4 for GRPO and .1 for PPO.
      entropy_adv_kappa: κ, at least 1.

    Raises:
      ValueError: a value is out of range.

    Reference: 2506.14758.

    >>> entropy_advantage(entropy_adv_alpha=0.1).update == entropy_advantage(entropy_adv_kappa=3.0).update
    True
    """
    require(0.0 <= entropy_adv_alpha < float("inf"), "entropy_adv_alpha", entropy_adv_alpha, "finite and at least 0")
    require(entropy_adv_kappa >= 1.0, "entropy_adv_kappa", entropy_adv_kappa, "at least 1")
    return Mechanism(
        init=lambda: EntropyAdvantageState(hyper(entropy_adv_alpha), hyper(entropy_adv_kappa)),
        update=_update,
        outputs=(ENTROPY,),
    )

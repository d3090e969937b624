"""CE-GPPO: tokens that PPO clips keep a bounded gradient."""

from typing import NamedTuple

import jax.numpy as jnp

from jentropy.base import Array, Mechanism, Plan, Signals, hyper, require
from jentropy.ratios import MAX_LOG_RATIO, clip, log_ratio


class CeGppoState(NamedTuple):
    """The scales of the two sides, scalars."""

    beta1: Array
    beta2: Array


def _update(plan: Plan, state: CeGppoState, signals: Signals, key: Array) -> tuple[Plan, CeGppoState]:
    del key
    batch, dtype = signals.batch, plan.pg_weight.dtype
    difference = log_ratio(signals.scores["log_prob"], batch.logp_old, batch.loss_mask)
    ratio = jnp.exp(clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    low_scale, high_scale = state.beta1.astype(dtype), state.beta2.astype(dtype)
    low = batch.loss_mask & (plan.advantage < 0.0) & (ratio < plan.ratio_low) & (low_scale > 0.0)
    high = batch.loss_mask & (plan.advantage > 0.0) & (ratio > plan.ratio_high) & (high_scale > 0.0)
    bound = jnp.where(low, low_scale * plan.ratio_low, jnp.where(high, high_scale * plan.ratio_high, ratio))
    num_tokens = jnp.sum(batch.loss_mask, dtype=dtype)
    plan = plan.replace(
        pg_weight=jnp.where(low | high, plan.pg_weight * (bound / ratio), plan.pg_weight),
        ratio_low=jnp.where(low | high, 0.0, plan.ratio_low),
        ratio_high=jnp.where(low | high, jnp.inf, plan.ratio_high),
    ).report(
        ce_gppo__low_fraction=(jnp.sum(low, dtype=dtype), num_tokens),
        ce_gppo__high_fraction=(jnp.sum(high, dtype=dtype), num_tokens),
    )
    return plan, state


def ce_gppo(*, beta1: float = 0.75, beta2: float = 1.0) -> Mechanism:
    """Gives the tokens that the ratio's bounds clip the gradient that they would have at the bound, scaled.

        A_t < 0 and r_t < low:    l_t = -β1 · low / sg(r_t) · r_t A_t
        A_t > 0 and r_t > high:   l_t = -β2 · high / sg(r_t) · r_t A_t,   else PPO's

    Clipped tokens are mostly unlikely ones. Those with a positive advantage (β2) raise the entropy, those with a
    negative one (β1) lower it: β1 below β2 keeps it up. As coefficients of the plan: the bounds of these tokens are
    taken away and their weight is multiplied by `β low / r` or `β high / r`, with the ratio of the plan's scores. Put
    it behind `clip_range`, whose bounds it reads; metrics of clipped tokens do not count them. At the first update of a
    rollout no token is clipped. A side with β = 0 stays clipped. The surrogate must be `ratio` or `dual_clip`: the
    authors have the latter, with c = 3. They do not clamp the log-ratio; here no gradient is left beyond ±20 nats.

    Args:
      beta1: β1, finite and at least 0; the authors have 0.75 and 0.5.
      beta2: β2, finite and at least 0.

    Returns:
      A mechanism that reports `ce_gppo/low_fraction` and `ce_gppo/high_fraction` of the response tokens.

    Raises:
      ValueError: a value is negative or not finite.

    Reference: 2509.20712.

    >>> ce_gppo(beta1=0.5).update == ce_gppo(beta2=2.0).update
    True
    """
    require(0.0 <= beta1 < float("inf"), "beta1", beta1, "finite and at least 0")
    require(0.0 <= beta2 < float("inf"), "beta2", beta2, "finite and at least 0")
    return Mechanism(lambda: CeGppoState(hyper(beta1), hyper(beta2)), _update, min_updates=2)

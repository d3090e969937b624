"""Row-wise policy-gradient losses: one value per token, to be weighted and summed outside.

Every surrogate is a loss to be minimised: a positive advantage raises the log-probability. Quantities may hold anything
outside `loss_mask`; the loss is 0 there.
"""

import dataclasses

import jax.numpy as jnp

from jentropy.base import Array, Metrics, Plan, Quantities, Rollouts, Surrogate, require
from jentropy.ratios import MAX_LOG_RATIO, clip, log_ratio


def _advantage(plan: Plan, batch: Rollouts) -> Array:
    return jnp.where(batch.loss_mask, plan.advantage, 0.0)


def _clamped_log_ratio(quantities: Quantities, batch: Rollouts) -> Array:
    difference = log_ratio(quantities["log_prob"], batch.logp_old, batch.loss_mask)
    return clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _token_means(plan: Plan, batch: Rollouts, **values: Array) -> Metrics:
    """`(sum, count)` over the tokens with a policy gradient; `__` in a keyword is `/` in the key."""
    used = batch.loss_mask & (plan.pg_weight != 0.0)
    dtype = plan.advantage.dtype
    count = jnp.sum(used, dtype=dtype)
    return {k.replace("__", "/"): (jnp.sum(jnp.where(used, v.astype(dtype), 0.0)), count) for k, v in values.items()}


def ratio(quantities: Quantities, plan: Plan, batch: Rollouts) -> tuple[Array, Metrics]:
    """The clipped ratio loss of PPO, with the bounds of the plan.

        l_t = -min(r_t A_t, clip(r_t, low_t, high_t) A_t),   r_t = exp(log π(t) - logp_old(t))

    Set the bounds with `mechanisms.clip_range`; without any, this is `-r_t A_t`. The log-ratio is clamped to ±20 before
    the exponential, which also stops the gradient outside, as in verl and Tunix. Exactly at a bound the gradient is
    the unclipped one.

    Args:
      quantities: must hold `log_prob` `[b, T]`.
      plan: advantage and bounds of the rows.
      batch: the rows; `logp_old` is the denominator of the ratio.

    Returns:
      The loss `[b, T]` and, as means over tokens with a policy gradient, `actor/pg_clipfrac` (the clipped branch is the
      active one), `actor/ppo_kl` (-log-ratio) and `clip_ratio/{low_mean,high_mean,region_mean}`.

    Reference: 1707.06347, eq. 7; clip-higher: 2503.14476, eq. 10.
    """
    log_r = _clamped_log_ratio(quantities, batch)
    r, advantage = jnp.exp(log_r), _advantage(plan, batch)
    loss = -jnp.minimum(r * advantage, clip(r, plan.ratio_low, plan.ratio_high) * advantage)
    low = (advantage < 0.0) & (r < plan.ratio_low)
    high = (advantage > 0.0) & (r > plan.ratio_high)
    metrics = _token_means(
        plan,
        batch,
        actor__pg_clipfrac=low | high,
        actor__ppo_kl=-log_r,
        clip_ratio__low_mean=low,
        clip_ratio__high_mean=high,
        clip_ratio__region_mean=low | high,
    )
    return loss, metrics


@dataclasses.dataclass(frozen=True)
class _DualClip:
    clip_ratio_c: float

    def __call__(self, quantities: Quantities, plan: Plan, batch: Rollouts) -> tuple[Array, Metrics]:
        loss, metrics = ratio(quantities, plan, batch)
        advantage = _advantage(plan, batch)
        bound = -self.clip_ratio_c * advantage
        negative = advantage < 0.0
        lower = _token_means(plan, batch, actor__pg_clipfrac_lower=negative & (loss > bound))
        return jnp.where(negative, jnp.minimum(loss, bound), loss), {**metrics, **lower}


def dual_clip(*, clip_ratio_c: float = 3.0) -> Surrogate:
    """`ratio`, with the loss of tokens of negative advantage bounded by `c |A|`: no gradient from a ratio above c.

        l_t = min(-min(r_t A_t, clip(r_t) A_t), -c A_t)   where A_t < 0

    Adds the metric `actor/pg_clipfrac_lower`. verl has it always on, with c = 3; DAPO's scripts use 10.

    Args:
      clip_ratio_c: c > 1.

    Raises:
      ValueError: c is not above 1.

    Reference: 1912.09729, eq. 5.

    >>> dual_clip(clip_ratio_c=10.0) == dual_clip(clip_ratio_c=10.0)
    True
    """
    require(clip_ratio_c > 1.0, "clip_ratio_c", clip_ratio_c, "above 1")
    return _DualClip(float(clip_ratio_c))


def reinforce(quantities: Quantities, plan: Plan, batch: Rollouts) -> tuple[Array, Metrics]:
    """The score-function loss `l_t = -A_t log π(t)`: no ratio, bounds are not read.

    Its value says nothing; its gradient at `log π = logp_old` is that of `ratio`.

    Args:
      quantities: must hold `log_prob` `[b, T]`.
      plan: advantage of the rows.
      batch: the rows.

    Returns:
      The loss `[b, T]` and `actor/ppo_kl`, -log-ratio as a mean over tokens with a policy gradient.

    Reference: Williams (1992), doi 10.1007/BF00992696.
    """
    log_prob = jnp.where(batch.loss_mask, quantities["log_prob"], 0.0)
    difference = log_ratio(quantities["log_prob"], batch.logp_old, batch.loss_mask)
    metrics = _token_means(plan, batch, actor__ppo_kl=-difference)
    return -_advantage(plan, batch) * log_prob, metrics

"""Row-wise policy-gradient losses: one value per token, to be weighted and summed outside.

Every surrogate is a loss to be minimised: a positive advantage raises the log-probability. Quantities may hold anything
outside `loss_mask`; the loss is 0 there.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jentropy.base import Array, Metrics, Plan, Quantities, Rollouts, Surrogate, require
from jentropy.ratios import MAX_LOG_RATIO, clip, log_ratio

MAX_LOG_SEQUENCE_RATIO = 10.0
"""GSPO's log-ratio of a sequence is clamped to at most 10 nats before it is exponentiated."""


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


def _clipped(r: Array, ppo_kl: Array, plan: Plan, batch: Rollouts) -> tuple[Array, Metrics]:
    """`-min(r A, clip(r, low, high) A)` of a ratio `[b, T]` of any kind, and what PPO reports."""
    advantage = _advantage(plan, batch)
    loss = -jnp.minimum(r * advantage, clip(r, plan.ratio_low, plan.ratio_high) * advantage)
    low = (advantage < 0.0) & (r < plan.ratio_low)
    high = (advantage > 0.0) & (r > plan.ratio_high)
    metrics = _token_means(
        plan,
        batch,
        actor__pg_clipfrac=low | high,
        actor__ppo_kl=ppo_kl,
        clip_ratio__low_mean=low,
        clip_ratio__high_mean=high,
        clip_ratio__region_mean=low | high,
    )
    return loss, metrics


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
    return _clipped(jnp.exp(log_r), -log_r, plan, batch)


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

    Adds the metric `actor/pg_clipfrac_lower`. verl has it always on, with c = 3; DAPO's scripts use 10. TRL's
    `delta` bounds the ratio in the unclipped branch instead, which is the same from 1 + epsilon_high on.

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


@dataclasses.dataclass(frozen=True)
class _Gspo:
    form: str

    def __call__(self, quantities: Quantities, plan: Plan, batch: Rollouts) -> tuple[Array, Metrics]:
        difference = log_ratio(quantities["log_prob"], batch.logp_old, batch.loss_mask)
        length = jnp.sum(batch.loss_mask, axis=1, keepdims=True, dtype=difference.dtype)
        mean = jnp.sum(difference, axis=1, keepdims=True) / jnp.maximum(length, 1.0)
        log_s = jnp.broadcast_to(mean, difference.shape)
        if self.form == "token":
            log_s = jax.lax.stop_gradient(log_s) + (difference - jax.lax.stop_gradient(difference))
        s = jnp.exp(clip(log_s, -jnp.inf, MAX_LOG_SEQUENCE_RATIO))
        return _clipped(s, -difference, plan, batch)


def gspo(*, form: str = "sequence") -> Surrogate:
    """The clipped loss of the length-normalised ratio of the whole response, on each of its tokens.

        l_t = -min(s A_t, clip(s, low_t, high_t) A_t),   s = exp(1/n Σ_t (log π(t) - logp_old(t)))

    Set the bounds with `clip_range(epsilon_low=3e-4, epsilon_high=4e-4)`: s is a mean over tokens, and PPO's 0.2 never
    clips it. Average with `normalisers.sequence_mean_token_mean`, which gives the paper's mean over responses; with
    `token_mean` (verl's `loss_agg_mode` unless it is set) long responses weigh more. log s is clamped to at most 10.

    `form="token"` is GSPO-token: the value of s with the gradient of the token's own log-probability, so that
    advantages may differ within a response. Where advantage and weight are the same on all tokens of each response,
    the two forms have one value and one gradient. verl's `gspo` is the token form, TRL's
    `importance_sampling_level="sequence"` the other one, without the clamp.

    Args:
      form: `"sequence"` or `"token"`.

    Returns:
      A surrogate with the metrics of `ratio`: `actor/pg_clipfrac` and `clip_ratio/*` are about s, `actor/ppo_kl` is the
      token mean of -log-ratio.

    Raises:
      ValueError: the form is unknown.

    Reference: 2507.18071, section 4.

    >>> gspo() == gspo(form="sequence")
    True
    """
    require(form in ("sequence", "token"), "form", form, "sequence or token")
    return _Gspo(form)


def sequence_ratio(quantities: Quantities, plan: Plan, batch: Rollouts) -> tuple[Array, Metrics]:
    """The clipped ratio loss of the response as one action, on each of its tokens.

        l_t = -min(ρ A_t, clip(ρ, low_t, high_t) A_t),   ρ = exp(Σ_t (log π(t) - logp_old(t)))

    The loss of RLOO in its paper and in TRL; average it with `normalisers.sequence_mean_token_mean`. ρ is a product
    over tokens, so with several updates per rollout most long responses are clipped. log ρ is clamped to ±20.

    Args:
      quantities: must hold `log_prob` `[b, T]`.
      plan: advantage and bounds of the rows.
      batch: the rows; `logp_old` is the denominator of the ratio.

    Returns:
      The loss `[b, T]` and the metrics of `ratio`, about ρ; `actor/ppo_kl` is the token mean of -log-ratio.

    Reference: 2402.14740.
    """
    difference = log_ratio(quantities["log_prob"], batch.logp_old, batch.loss_mask)
    total = jnp.broadcast_to(jnp.sum(difference, axis=1, keepdims=True), difference.shape)
    return _clipped(jnp.exp(clip(total, -MAX_LOG_RATIO, MAX_LOG_RATIO)), -difference, plan, batch)


@dataclasses.dataclass(frozen=True)
class _Cispo:
    cap: float | None

    def __call__(self, quantities: Quantities, plan: Plan, batch: Rollouts) -> tuple[Array, Metrics]:
        log_r = jax.lax.stop_gradient(_clamped_log_ratio(quantities, batch))
        r = jnp.exp(log_r)
        low, high = (plan.ratio_low, plan.ratio_high) if self.cap is None else (0.0, self.cap)
        log_prob = jnp.where(batch.loss_mask, quantities["log_prob"], 0.0)
        metrics = _token_means(
            plan,
            batch,
            actor__pg_clipfrac=(r < low) | (r > high),
            actor__ppo_kl=-log_r,
            clip_ratio__low_mean=r < low,
            clip_ratio__high_mean=r > high,
            clip_ratio__region_mean=(r < low) | (r > high),
        )
        return -clip(r, low, high) * _advantage(plan, batch) * log_prob, metrics


def cispo(*, cap: float | None = None) -> Surrogate:
    """The score-function loss weighted by the clipped ratio: every token keeps its gradient.

        l_t = -sg(clip(r_t, low_t, high_t)) A_t log π(t),   or with a cap  -sg(min(r_t, cap)) A_t log π(t)

    Clipping bounds the weight of a token and never stops its gradient, so rare tokens that PPO clips still learn. With
    `cap=None` the bounds are those of the plan on both sides, as verl's are (its recipe is `clip_range(epsilon_low=1.0,
    epsilon_high=4.0)`); a `cap` is TRL's `epsilon_high` under `loss_type="cispo"`: the largest weight itself, such as
    5, not a distance from 1, with no lower bound. Its value says nothing.

    Args:
      cap: at least 1, or None.

    Returns:
      A surrogate that reports, as means over tokens with a policy gradient, `actor/pg_clipfrac` and
      `clip_ratio/{low_mean,high_mean,region_mean}` (the weight is not the ratio, whatever the advantage's sign) and
      `actor/ppo_kl`.

    Raises:
      ValueError: the cap is below 1.

    Reference: 2506.13585, section 3.1.

    >>> cispo(cap=5) == cispo(cap=5.0)
    True
    """
    require(cap is None or cap >= 1.0, "cap", cap, "at least 1 or None")
    return _Cispo(None if cap is None else float(cap))

"""Clip-Cov: no policy gradient for a few random tokens of high covariance."""

from typing import NamedTuple

import jax.numpy as jnp

from jentropy import stats
from jentropy.base import Array, Mechanism, Plan, Signals, hyper, require
from jentropy.ratios import MAX_LOG_RATIO, clip, log_ratio


class ClipCovState(NamedTuple):
    """The fraction as an exact ratio of int32, and the band and the least number of tokens, scalars."""

    clip_cov_ratio: stats.FractionParts
    clip_cov_lb: Array
    clip_cov_ub: Array
    min_tokens: Array


def _is_ratio_clipped(plan: Plan, signals: Signals) -> Array:
    """`[B, T]` bool: tokens whose gradient the bounds of the plan already stop."""
    batch = signals.batch
    difference = log_ratio(signals.scores["log_prob"], batch.logp_old, batch.loss_mask)
    ratio = jnp.exp(clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    above = (plan.advantage > 0.0) & (ratio > plan.ratio_high)
    below = (plan.advantage < 0.0) & (ratio < plan.ratio_low)
    return batch.loss_mask & (above | below)


def candidates(plan: Plan, state: ClipCovState, signals: Signals) -> Array:
    """Tokens that may be drawn, `[B, T]` bool: covariance strictly inside the band, ratio not clipped by the plan."""
    mask = signals.batch.loss_mask
    covariance = stats.cross_deviation(signals.scores["log_prob"], plan.advantage, mask)
    low, high = (x.astype(covariance.dtype) for x in (state.clip_cov_lb, state.clip_cov_ub))
    return mask & (covariance > low) & (covariance < high) & ~_is_ratio_clipped(plan, signals)


def num_selected(state: ClipCovState, mask: Array, candidate: Array) -> Array:
    """`min(max(⌊ratio · N⌋, min_tokens), |C|)`, int32; 0 when the ratio is 0."""
    wanted = jnp.maximum(stats.fraction_of(jnp.sum(mask, dtype=jnp.int32), state.clip_cov_ratio), state.min_tokens)
    wanted = jnp.where(state.clip_cov_ratio.numerator > 0, wanted, 0)
    return jnp.minimum(wanted, jnp.sum(candidate, dtype=jnp.int32))


def drop(plan: Plan, selected: Array) -> Plan:
    """Takes the policy gradient away from the selected tokens `[B, T]`; they stay counted."""
    return plan.replace(pg_weight=jnp.where(selected, 0.0, plan.pg_weight))


def _update(plan: Plan, state: ClipCovState, signals: Signals, key: Array) -> tuple[Plan, ClipCovState]:
    batch, dtype = signals.batch, plan.advantage.dtype
    candidate = candidates(plan, state, signals)
    selected = stats.random_mask(key, batch.row_id, candidate, num_selected(state, batch.loss_mask, candidate))
    num_tokens = jnp.sum(batch.loss_mask, dtype=dtype)
    plan = drop(plan, selected).report(
        clip_cov__selected_fraction=(jnp.sum(selected, dtype=dtype), num_tokens),
        clip_cov__candidate_fraction=(jnp.sum(candidate, dtype=dtype), num_tokens),
    )
    return plan, state


def clip_cov(
    *, clip_cov_ratio: float = 2e-4, clip_cov_lb: float = 1.0, clip_cov_ub: float = 5.0, min_tokens: int = 1
) -> Mechanism:
    """Drops the policy gradient of a random few tokens whose covariance term lies in a band.

        c_t = (log π_t - mean log π)(A_t - mean A),   means over the response tokens of the batch
        C = {t: lb < c_t < ub, not clipped by the ratio bounds},   drop min(max(⌊ratio · N⌋, min_tokens), |C|) of C

    Tokens with a large c_t lower the entropy most. They are drawn uniformly without replacement (key: consumed) and
    stay in the denominator. Put `clip_range` before it in the chain. The ratio 0 is the identity.

    As released (verl `clip_cov`): tokens that PPO already clips are no candidates and at least one token is taken,
    neither of which the paper has; the paper has no ratio clipping elsewhere, which its recipes emulate with
    `clip_range(epsilon_low=1.0, epsilon_high=1.0)`. The released code takes statistics and selection per micro-batch:
    see `compose.blockwise`. The band is absolute: it scales with the advantage.

    Args:
      clip_cov_ratio: fraction of response tokens, in [0, 1].
      clip_cov_lb: lower end of the band, exclusive.
      clip_cov_ub: upper end of the band, exclusive; above `clip_cov_lb`.
      min_tokens: least number of tokens to drop, at least 0; 0 is the paper's rule.

    Raises:
      ValueError: a value is out of range.

    Reference: 2505.22617, section 4.2.

    >>> clip_cov(clip_cov_ratio=0.1).update == clip_cov(clip_cov_lb=0.5).update
    True
    """
    require(0.0 <= clip_cov_ratio <= 1.0, "clip_cov_ratio", clip_cov_ratio, "in [0, 1]")
    require(clip_cov_lb < clip_cov_ub, "clip_cov_ub", clip_cov_ub, f"above clip_cov_lb = {clip_cov_lb!r}")
    require(min_tokens >= 0, "min_tokens", min_tokens, "at least 0")

    def init() -> ClipCovState:
        fraction = stats.fraction_parts(clip_cov_ratio)
        return ClipCovState(fraction, hyper(clip_cov_lb), hyper(clip_cov_ub), jnp.int32(min_tokens))

    return Mechanism(init, _update)

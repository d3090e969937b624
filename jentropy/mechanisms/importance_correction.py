"""Correction for a sampler whose probabilities are not the trainer's: importance weights, and rejection."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import ratios, stats
from jentropy.base import Array, Mechanism, Plan, Rollouts, Signals, hyper, require


class ImportanceState(NamedTuple):
    """The bounds, scalars."""

    lower: Array
    upper: Array


_LEVELS = ("token", "sequence", "sequence_mean")
_STATISTICS = {"ratio": lambda x: x, "k2": lambda x: jnp.square(x) / 2.0, "k3": ratios.k3}


def log_mismatch(batch: Rollouts) -> Array:
    """`logp_old - logp_sampler` `[B, T]`: 0 outside the mask and where the sampler gave NaN."""
    return jnp.nan_to_num(ratios.log_ratio(batch.logp_old, batch.logp_sampler, batch.loss_mask), nan=0.0)


def _over_rows(x: Array, mask: Array, level: str) -> Array:
    """Of `x` `[B, T]`: itself, or each row's sum or mean over the mask on all of its columns."""
    if level == "token":
        return x
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=1, keepdims=True)
    if level == "sequence_mean":
        total = total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True, dtype=x.dtype), 1.0)
    return jnp.broadcast_to(total, x.shape)


@dataclasses.dataclass(frozen=True)
class _Weigh:
    level: str
    mode: str
    batch_normalise: bool

    def __call__(
        self, plan: Plan, state: ImportanceState, signals: Signals, key: Array
    ) -> tuple[Plan, ImportanceState]:
        del key
        mask, dtype = signals.batch.loss_mask, plan.pg_weight.dtype
        low, high = state.lower.astype(dtype), state.upper.astype(dtype)
        log_ratio = _over_rows(log_mismatch(signals.batch), mask, self.level)
        ratio = jnp.exp(jnp.clip(log_ratio, -ratios.MAX_LOG_RATIO, ratios.MAX_LOG_RATIO)).astype(dtype)
        outside = mask & ((ratio < low) | (ratio > high))
        weight = jnp.clip(ratio, low, high) if self.mode == "truncate" else jnp.where(outside, 0.0, ratio)
        mean = self._mean(weight, mask)
        applied = weight / jnp.where(mean > 0.0, mean, 1.0) if self.batch_normalise else weight
        num_tokens, one = jnp.sum(mask, dtype=dtype), jnp.ones((), dtype)
        total, squares = stats.masked_sum(weight, mask), stats.masked_sum(jnp.square(weight), mask)
        effective = jnp.square(total) / jnp.where(squares > 0.0, squares * jnp.maximum(num_tokens, 1.0), 1.0)
        plan = plan.replace(pg_weight=jnp.where(mask, plan.pg_weight * applied, 0.0))
        plan = plan.report(
            rollout_is__mean=(total, num_tokens),
            rollout_is__outside_fraction=(jnp.sum(outside, dtype=dtype), num_tokens),
            rollout_is__effective_sample_size=(effective, one),
        )
        return plan, state

    def _mean(self, weight: Array, mask: Array) -> Array:
        """The mean over tokens, or over rows that have any; 0 without any."""
        if self.level == "token":
            return stats.masked_mean(weight, mask)
        rows = jnp.any(mask, axis=1)
        return stats.masked_mean(jnp.max(jnp.where(mask, weight, 0.0), axis=1), rows)


def importance_correction(
    *,
    level: str = "token",
    mode: str = "truncate",
    rollout_is_threshold: float = 2.0,
    lower: float = 0.0,
    batch_normalise: bool = False,
) -> Mechanism:
    """Multiplies the policy-gradient loss by the importance weight of the trainer's against the sampler's policy.

        w = exp(logp_old - logp_sampler),   truncate: clip(w, lower, C),   mask: w · 1[lower <= w <= C]

    at the level of the token, or of the response with the sum or the mean of its log-ratios, which is clamped to ±20.
    The weight comes after the minimum and the clip of the surrogate and has no gradient. Terms (divergences, entropy)
    are not multiplied. Masked tokens stay in all denominators: see `rejection` for the other choice. A NaN of the
    sampler counts as a log-ratio of 0.

    Bounds are on the weight itself. `truncate` is TIS, `mask` with a lower bound IcePop. The ratio of the surrogate
    always has the trainer's own `logp_old` in its denominator, so nothing is counted twice. Known as `rollout_is`,
    `rollout_is_threshold` (verl; `"0.5_5.0"` is `mode="mask", lower=0.5, rollout_is_threshold=5.0`) and
    `vllm_importance_sampling_mode`, `..._clip_min`, `..._clip_max` (TRL, whose default is `level="sequence",
    mode="mask", rollout_is_threshold=3.0`: a product over thousands of tokens is rarely inside).

    Args:
      level: `"token"`, `"sequence"` (product of the tokens' ratios) or `"sequence_mean"` (their geometric mean).
      mode: `"truncate"` or `"mask"`.
      rollout_is_threshold: C, above 0; inf is no bound.
      lower: at least 0 and at most C. `lower = C = 1` with `"truncate"` is the identity.
      batch_normalise: divide by the mean weight of the update batch, over tokens or over responses. If all weights are
        0 they stay 0.

    Returns:
      A mechanism that reports `rollout_is/mean` and `rollout_is/effective_sample_size` ((Σw)² / (N Σw²), 0 if all are
      0) of the bounded weights and `rollout_is/outside_fraction`, the tokens whose w was out of bounds.

    Raises:
      ValueError: a value is out of range.

    Reference: truncation: Ionides (2008), doi 10.1198/106186008X320456; IcePop: 2510.18855.

    >>> importance_correction(lower=0.5).update == importance_correction().update
    True
    """
    require(level in _LEVELS, "level", level, f"one of {list(_LEVELS)}")
    require(mode in ("truncate", "mask"), "mode", mode, "truncate or mask")
    require(rollout_is_threshold > 0.0, "rollout_is_threshold", rollout_is_threshold, "above 0")
    require(0.0 <= lower <= rollout_is_threshold, "lower", lower, f"in [0, {rollout_is_threshold!r}]")
    return Mechanism(
        init=lambda: ImportanceState(hyper(lower), hyper(rollout_is_threshold)),
        update=_Weigh(level, mode, batch_normalise),
    )


@dataclasses.dataclass(frozen=True)
class _Reject:
    level: str
    statistic: str
    denominator: str

    def kept(self, state: ImportanceState, batch: Rollouts) -> Array:
        """Tokens inside the bounds, `[B, T]` bool."""
        mask, log_ratio = batch.loss_mask, log_mismatch(batch)
        log_ratio = jnp.clip(log_ratio, -ratios.MAX_LOG_RATIO, ratios.MAX_LOG_RATIO)
        value = _STATISTICS[self.statistic](log_ratio)
        low, high = state.lower.astype(value.dtype), state.upper.astype(value.dtype)
        if self.statistic == "ratio":
            low, high = jnp.log(low), jnp.log(high)
        if self.level == "sequence_max":
            inside = jnp.all(~mask | ((value >= low) & (value <= high)), axis=1, keepdims=True)
        else:
            value = _over_rows(value, mask, self.level)
            inside = (value >= low) & (value <= high)
        return mask & inside

    def __call__(
        self, plan: Plan, state: ImportanceState, signals: Signals, key: Array
    ) -> tuple[Plan, ImportanceState]:
        del key
        mask, dtype = signals.batch.loss_mask, plan.pg_weight.dtype
        kept = self.kept(state, signals.batch)
        plan = plan.replace(pg_weight=jnp.where(kept, plan.pg_weight, 0.0))
        if self.denominator == "kept":
            plan = plan.replace(counted=plan.counted & kept)
        rows, hit = jnp.any(mask, axis=1), jnp.any(mask & ~kept, axis=1)
        plan = plan.report(
            rollout_rs__masked_fraction=(jnp.sum(mask & ~kept, dtype=dtype), jnp.sum(mask, dtype=dtype)),
            rollout_rs__seq_masked_fraction=(jnp.sum(hit, dtype=dtype), jnp.sum(rows, dtype=dtype)),
        )
        return plan, state


def rejection(
    *,
    level: str = "sequence_mean",
    statistic: str = "ratio",
    lower: float | None = None,
    upper: float = 1.001,
    denominator: str = "kept",
) -> Mechanism:
    """Takes tokens or responses out of the policy-gradient loss where sampler and trainer disagree too much.

        keep where lower <= s <= upper,   d = logp_old - logp_sampler of a token,
        s = exp(d), d² / 2 or eᵈ - 1 - d, at the level of the token or of the response

    Weights of what is kept do not change: chain `importance_correction` with it for both. For the ratio, sum and mean
    over a response are taken of d. `"sequence_max"` keeps a response if all of its tokens are inside. d is clamped to
    ±20; a NaN of the sampler counts as d = 0.

    Known as `rollout_rs`, `rollout_rs_threshold` (verl), whose `token_k1`, `seq_sum_k1` and `seq_mean_k1` compare -d
    with the logarithms of its bounds: verl's `"0.8_2.0"` keeps ratios in [0.5, 1.25]. Here the bounds are those of the
    ratio: `lower=1 / 2.0, upper=1 / 0.8` is verl's. `seq_max_k2` is `level="sequence_max", statistic="k2"`. verl also
    takes rejected tokens out of divergence and entropy, which here keep all response tokens.

    Args:
      level: `"token"`, `"sequence"` (sum), `"sequence_mean"` or `"sequence_max"`.
      statistic: `"ratio"`, `"k2"` or `"k3"`.
      lower: of the ratio, at least 0 and at most `upper`; None is `1 / upper`. Not used by the other statistics.
      upper: above 0; inf is no bound.
      denominator: `"kept"`: what is rejected leaves the normaliser's denominator (verl); `"all"`: it stays (TRL).

    Returns:
      A mechanism that reports `rollout_rs/masked_fraction` of the tokens and `rollout_rs/seq_masked_fraction` of the
      responses.

    Raises:
      ValueError: a value is out of range, or a lower bound of a divergence.

    >>> rejection(upper=1.01).update == rejection().update
    True
    """
    levels = (*_LEVELS, "sequence_max")
    require(level in levels, "level", level, f"one of {list(levels)}")
    require(statistic in _STATISTICS, "statistic", statistic, f"one of {list(_STATISTICS)}")
    require(upper > 0.0, "upper", upper, "above 0")
    require(lower is None or statistic == "ratio", "lower", lower, f"None with statistic = {statistic!r}")
    require(lower is None or 0.0 <= lower <= upper, "lower", lower, f"None or in [0, {upper!r}]")
    require(denominator in ("kept", "all"), "denominator", denominator, "kept or all")
    if lower is None:
        lower = 1.0 / upper if statistic == "ratio" else 0.0
        require(lower <= upper, "upper", upper, "at least 1 without a lower bound")
    return Mechanism(
        init=lambda: ImportanceState(hyper(lower), hyper(upper)), update=_Reject(level, statistic, denominator)
    )

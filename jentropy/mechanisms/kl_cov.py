"""KL-Cov: a penalty on the log-ratio of the tokens with the largest covariance."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jentropy import ratios, stats
from jentropy.base import Array, Mechanism, Normaliser, Plan, Quantities, Rollouts, Signals, hyper, require
from jentropy.normalisers import token_mean


class KlCovState(NamedTuple):
    """The fraction as an exact ratio of int32, and the coefficient, a scalar."""

    kl_cov_ratio: stats.FractionParts
    ppo_kl_coef: Array


def _log_ratio(quantities: Quantities, batch: Rollouts) -> Array:
    return ratios.log_ratio(quantities["log_prob"], batch.logp_old, batch.loss_mask)


def abs_log_ratio(quantities: Quantities, plan: Plan, batch: Rollouts) -> Array:
    """`|log π - logp_old|` `[B, T]`, with gradient `sign`, exactly 0 at 0 (JAX's own derivative of abs is 1 there)."""
    del plan
    x = _log_ratio(quantities, batch)
    return x * jax.lax.stop_gradient(jnp.sign(x))


def k3_log_ratio(quantities: Quantities, plan: Plan, batch: Rollouts) -> Array:
    """`r - 1 - log r` `[B, T]`: the k3 estimate of D_KL(π_old || π)."""
    del plan
    return ratios.k3(_log_ratio(quantities, batch))


_TERMS = {"abs": abs_log_ratio, "k3": k3_log_ratio}


def select(plan: Plan, state: KlCovState, signals: Signals) -> Array:
    """The `max(⌊ratio · N⌋, 1)` response tokens of largest covariance, `[B, T]` bool.

    None when the ratio is 0 or the advantage is the same on all response tokens.
    """
    mask = signals.batch.loss_mask
    covariance = stats.cross_deviation(signals.scores["log_prob"], plan.advantage, mask)
    k = jnp.maximum(stats.fraction_of(jnp.sum(mask, dtype=jnp.int32), state.kl_cov_ratio), 1)
    none = (state.kl_cov_ratio.numerator == 0) | stats.is_constant(plan.advantage, mask)
    return stats.top_k_mask(covariance, mask, jnp.where(none, 0, k), signals.batch.row_id)


@dataclasses.dataclass(frozen=True)
class _Update:
    term: str
    keep_clip: bool
    normaliser: Normaliser

    def __call__(self, plan: Plan, state: KlCovState, signals: Signals, key: Array) -> tuple[Plan, KlCovState]:
        del key
        batch, dtype = signals.batch, plan.advantage.dtype
        selected = select(plan, state, signals)
        weight = state.ppo_kl_coef.astype(dtype) * self.normaliser(plan.counted, batch)
        plan = plan.raise_term(self.term, jnp.where(selected, weight, 0.0))
        if not self.keep_clip:
            plan = plan.replace(
                ratio_low=jnp.zeros_like(plan.ratio_low), ratio_high=jnp.full_like(plan.ratio_high, jnp.inf)
            )
        distance = jnp.abs(_log_ratio(signals.scores, batch))
        num_selected = jnp.sum(selected, dtype=dtype)
        plan = plan.report(
            kl_cov__selected_fraction=(num_selected, jnp.sum(batch.loss_mask, dtype=dtype)),
            kl_cov__selected_abs_log_ratio=(stats.masked_sum(distance, selected), num_selected),
        )
        return plan, state


def kl_cov(
    *,
    kl_cov_ratio: float = 2e-4,
    ppo_kl_coef: float = 1.0,
    estimator: str = "abs",
    keep_clip: bool = False,
    normaliser: Normaliser = token_mean,
) -> Mechanism:
    """Penalises the move away from the old policy on the tokens with the largest covariance term.

        c_t = (log π_t - mean log π)(A_t - mean A),   means over the response tokens of the batch
        loss_t = -r_t A_t + 1[t among the max(⌊ratio · N⌋, 1) largest c] · β |log π_t - logp_old_t|

    The penalty is what the released code has: the absolute log-ratio. Its gradient is `β sign(log-ratio)`, exactly 0
    at a ratio of 1, so the first on-policy update is untouched; the paper writes D_KL(π_old || π), which
    `estimator="k3"` estimates. The released code does not clip the ratio anywhere, so the bounds of all tokens are set
    to unclipped. Ties in covariance go to the lowest `(row_id, column)`. With one advantage on all tokens there is no
    covariance and no penalty (the released code penalises tokens picked by rounding noise). The released code takes
    statistics and selection per micro-batch: see `compose.blockwise`. The ratio 0 is no penalty.

    Args:
      kl_cov_ratio: fraction of response tokens, in [0, 1]. The authors' `k_percent` is in percent: 0.2 (7B) is 2e-3.
      ppo_kl_coef: β, finite and at least 0. verl's config has 0.1, its function and the authors' scripts 1.
      estimator: `"abs"` or `"k3"`.
      keep_clip: leave the bounds of the ratio as they are.
      normaliser: that of the policy loss: the penalty is added to the token's loss before it is averaged. It is applied
        to the tokens counted so far.

    Raises:
      ValueError: a value is out of range.

    Reference: 2505.22617, section 4.2.

    >>> kl_cov(kl_cov_ratio=0.1).update == kl_cov(ppo_kl_coef=0.1).update
    True
    """
    require(0.0 <= kl_cov_ratio <= 1.0, "kl_cov_ratio", kl_cov_ratio, "in [0, 1]")
    require(0.0 <= ppo_kl_coef < float("inf"), "ppo_kl_coef", ppo_kl_coef, "finite and at least 0")
    require(estimator in _TERMS, "estimator", estimator, f"one of {sorted(_TERMS)}")
    term = f"{estimator}_log_ratio"

    def init() -> KlCovState:
        return KlCovState(stats.fraction_parts(kl_cov_ratio), hyper(ppo_kl_coef))

    return Mechanism(init, _Update(term, keep_clip, normaliser), terms={term: _TERMS[estimator]}, min_updates=2)

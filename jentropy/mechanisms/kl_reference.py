"""A penalty on the divergence from a reference policy, added to the loss."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jentropy import ratios, stats
from jentropy.base import (
    Array,
    Mechanism,
    Normaliser,
    Output,
    Plan,
    Quantities,
    Rollouts,
    Signals,
    Term,
    hyper,
    require,
)
from jentropy.compose import quantity
from jentropy.normalisers import token_mean


class KlReferenceState(NamedTuple):
    """The coefficient, a scalar."""

    beta: Array


def _log_ratio(quantities: Quantities, batch: Rollouts) -> Array:
    if "ref_log_prob" not in batch.token_data:
        raise ValueError(f"kl_reference needs token_data['ref_log_prob'], got {sorted(batch.token_data)}")
    return ratios.log_ratio(quantities["log_prob"], batch.token_data["ref_log_prob"], batch.loss_mask)


def k1(quantities: Quantities, plan: Plan, batch: Rollouts) -> Array:
    """`d = log π - log π_ref` `[B, T]`."""
    del plan
    return _log_ratio(quantities, batch)


def k2(quantities: Quantities, plan: Plan, batch: Rollouts) -> Array:
    """`d² / 2` `[B, T]`; its gradient `d` is that of D_KL(π || π_ref), in expectation over samples of π."""
    del plan
    return jnp.square(_log_ratio(quantities, batch)) / 2.0


def k3(quantities: Quantities, plan: Plan, batch: Rollouts) -> Array:
    """`e⁻ᵈ - 1 + d` `[B, T]`, with gradient `1 - e⁻ᵈ`."""
    del plan
    return ratios.k3(-_log_ratio(quantities, batch))


def k3_straight_through(quantities: Quantities, plan: Plan, batch: Rollouts) -> Array:
    """The value of `k3` with the gradient of `k2`, `[B, T]`."""
    value, carrier = k3(quantities, plan, batch), k2(quantities, plan, batch)
    return carrier + jax.lax.stop_gradient(value - carrier)


_TERMS: dict[str, tuple[str, Term]] = {
    "k1": ("kl_k1", k1),
    "k2": ("kl_k2", k2),
    "k3": ("kl_k3", k3),
    "k3+": ("kl_k3_straight_through", k3_straight_through),
    "full": ("reference_kl", quantity("reference_kl")),
}


@dataclasses.dataclass(frozen=True)
class _Update:
    name: str
    term: Term
    normaliser: Normaliser

    def __call__(
        self, plan: Plan, state: KlReferenceState, signals: Signals, key: Array
    ) -> tuple[Plan, KlReferenceState]:
        del key
        batch = signals.batch
        weight = self.normaliser(batch.loss_mask, batch)
        beta = state.beta.astype(weight.dtype)
        divergence = stats.masked_sum(self.term(signals.scores, plan, batch), batch.loss_mask)
        plan = plan.raise_term(self.name, beta * weight).report(
            actor__kl_loss=(divergence, jnp.sum(batch.loss_mask, dtype=divergence.dtype)),
            actor__kl_coef=(beta, jnp.ones_like(beta)),
        )
        return plan, state


def kl_reference(*, beta: float = 0.001, estimator: str = "k3", normaliser: Normaliser = token_mean) -> Mechanism:
    """Adds `β · mean D_t` to the loss, D an estimate of D_KL(π || π_ref) from the sampled token.

        d = log π - log π_ref,   k1 = d,   k2 = d² / 2,   k3 = e⁻ᵈ - 1 + d

    The mean is over all response tokens, whatever other mechanisms take out of the policy-gradient loss. Needs
    `token_data["ref_log_prob"]`, except `"full"`, which is the divergence over the whole vocabulary. Of the others only
    the gradient of k2 is that of D_KL(π || π_ref) on-policy; k1's is 0 in expectation: use it in the reward, not here.
    Known as `beta` (TRL), `kl_loss_coef` and `kl_loss_type` (verl: `low_var_kl` is k3). Reports `actor/kl_loss` as the
    token mean of D, without β.

    verl clamps k3 to ±10, which stops its gradient where the policies are furthest apart (d < -2.6); here it lives on.
    TRL multiplies k3 by the ratio by default (`use_bias_correction_kl`), which is not done here.

    Args:
      beta: β, finite and at least 0; 0 is the identity.
      estimator: `"k1"`, `"k2"`, `"k3"`, `"k3+"` (value of k3, gradient of k2) or `"full"`.
      normaliser: how D is averaged; verl and TRL use that of the policy loss.

    Raises:
      ValueError: a value is out of range or, when traced, `ref_log_prob` is missing.

    Reference: 2402.03300, eq. 4; estimators: Schulman, "Approximating KL divergence" (2020).

    >>> kl_reference(beta=0.04).update == kl_reference().update
    True
    """
    require(0.0 <= beta < float("inf"), "beta", beta, "finite and at least 0")
    require(estimator in _TERMS, "estimator", estimator, f"one of {sorted(_TERMS)}")
    name, term = _TERMS[estimator]
    return Mechanism(
        init=lambda: KlReferenceState(hyper(beta)),
        update=_Update(name, term, normaliser),
        outputs=(Output("reference_kl"),) if estimator == "full" else (),
        terms={name: term},
        requires=("ref_log_prob",),
    )

"""A bonus on the entropy of the policy with a fixed coefficient."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jentropy.base import ENTROPY, Array, Mechanism, Normaliser, Plan, Signals, hyper, require
from jentropy.compose import quantity
from jentropy.normalisers import token_mean


class EntropyBonusState(NamedTuple):
    """The coefficient, a scalar."""

    entropy_coef: Array


@dataclasses.dataclass(frozen=True)
class _Update:
    normaliser: Normaliser

    def __call__(
        self, plan: Plan, state: EntropyBonusState, signals: Signals, key: Array
    ) -> tuple[Plan, EntropyBonusState]:
        del key
        batch = signals.batch
        weight = self.normaliser(batch.loss_mask, batch)
        coefficient = state.entropy_coef.astype(weight.dtype)
        plan = plan.raise_term("entropy", -coefficient * weight)
        return plan.report(actor__entropy_coef=(coefficient, jnp.ones_like(coefficient))), state


def entropy_bonus(*, entropy_coef: float = 0.0, normaliser: Normaliser = token_mean) -> Mechanism:
    """Subtracts `α · mean H_t` from the loss, with the gradient through the entropy of the whole distribution.

    The mean is over all response tokens, even those that other mechanisms take out of the policy-gradient loss, so α
    means the same in every chain. (TRL, with its top-entropy mask on, divides the entropy of the masked-in tokens by
    the number of all.) Known as `entropy_coef` (TRL), `entropy_coeff` (verl).

    Args:
      entropy_coef: α, finite and at least 0; 0 is the identity.
      normaliser: how H is averaged; verl uses that of the policy loss.

    Raises:
      ValueError: the coefficient is negative or not finite.

    Reference: 1602.01783, section 4.

    >>> entropy_bonus(entropy_coef=0.001).update == entropy_bonus().update
    True
    """
    require(0.0 <= entropy_coef < float("inf"), "entropy_coef", entropy_coef, "finite and at least 0")
    return Mechanism(
        init=lambda: EntropyBonusState(hyper(entropy_coef)),
        update=_Update(normaliser),
        outputs=(ENTROPY,),
        terms={"entropy": quantity("entropy")},
    )

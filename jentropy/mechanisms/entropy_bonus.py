"""A bonus on the entropy of the policy with a fixed or a scheduled coefficient."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import chex
import jax.numpy as jnp

from jentropy.base import ENTROPY, Array, Mechanism, Normaliser, Plan, Signals, hyper, require
from jentropy.compose import quantity
from jentropy.normalisers import token_mean

Schedule: TypeAlias = Callable[[Array], Array | float]
"""(number of the rollout, int32 scalar) -> coefficient, scalar."""

_ERROR = "error/the schedule's entropy_coef is negative or not finite"


class EntropyBonusState(NamedTuple):
    """The coefficient, a scalar; under a schedule that of the last update."""

    entropy_coef: Array


@dataclasses.dataclass(frozen=True)
class _Update:
    normaliser: Normaliser
    schedule: Schedule | None

    def _scheduled(self, plan: Plan, state: EntropyBonusState, step: Array) -> tuple[Plan, EntropyBonusState]:
        if self.schedule is None:
            return plan, state
        found = jnp.asarray(self.schedule(step), state.entropy_coef.dtype)
        chex.assert_rank(found, 0)
        good = (found >= 0.0) & jnp.isfinite(found)
        bad = (~good).astype(plan.advantage.dtype)
        return plan.report(**{_ERROR: (bad, jnp.ones_like(bad))}), EntropyBonusState(jnp.where(good, found, 0.0))

    def __call__(
        self, plan: Plan, state: EntropyBonusState, signals: Signals, key: Array
    ) -> tuple[Plan, EntropyBonusState]:
        del key
        batch = signals.batch
        plan, state = self._scheduled(plan, state, signals.step)
        weight = self.normaliser(batch.loss_mask, batch)
        coefficient = state.entropy_coef.astype(weight.dtype)
        plan = plan.raise_term("entropy", -coefficient * weight)
        return plan.report(actor__entropy_coef=(coefficient, jnp.ones_like(coefficient))), state


def entropy_bonus(*, entropy_coef: float | Schedule = 0.0, normaliser: Normaliser = token_mean) -> Mechanism:
    """Subtracts `α · mean H_t` from the loss, with the gradient through the entropy of the whole distribution.

    The mean is over all response tokens, even those that other mechanisms take out of the policy-gradient loss, so α
    means the same in every chain. (TRL, with its top-entropy mask on, divides the entropy of the masked-in tokens by
    the number of all.) Known as `entropy_coef` (TRL), `entropy_coeff` (verl).

    Args:
      entropy_coef: α, finite and at least 0; 0 is the identity. Or a schedule: a function from the number of the
        rollout in the run, an int32 scalar, to α. It is compiled in; two are equal if they are the same object, or
        equal frozen dataclasses. A value out of range counts as 0 and is reported as an error, which stops a run.
      normaliser: how H is averaged; verl uses that of the policy loss.

    Raises:
      ValueError: the coefficient is negative or not finite.

    Reference: 1602.01783, section 4.

    >>> entropy_bonus(entropy_coef=0.001).update == entropy_bonus().update
    True
    """
    schedule, fixed = (entropy_coef, 0.0) if callable(entropy_coef) else (None, entropy_coef)
    require(0.0 <= fixed < float("inf"), "entropy_coef", fixed, "finite and at least 0")
    return Mechanism(
        init=lambda: EntropyBonusState(hyper(fixed)),
        update=_Update(normaliser, schedule),
        outputs=(ENTROPY,),
        terms={"entropy": quantity("entropy")},
    )

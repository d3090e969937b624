"""A guard on both sides: an entropy term whose coefficient acts only while the entropy has left a band."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import stats
from jentropy.base import ENTROPY, Array, Mechanism, Normaliser, Plan, Signals, hyper, require
from jentropy.compose import quantity
from jentropy.normalisers import token_mean


class EntropyBandState(NamedTuple):
    """Numbers of the method, then the controller's own state; scalars.

    Attributes:
      entropy_low: lower end of the band, nats.
      entropy_high: upper end of the band, nats.
      margin: how far inside the band the guard lets go, nats.
      entropy_coef_delta: step of the coefficient while the guard acts.
      entropy_coef_return: step towards 0 while it does not.
      entropy_coef_max: bound of the coefficient on both sides.
      coef: c, the coefficient of the entropy.
      side: int32, why it acts: 1 the entropy is too low, -1 it is too high, 0 not at all.
      step: int32, the rollout for which this was decided.
    """

    entropy_low: Array
    entropy_high: Array
    margin: Array
    entropy_coef_delta: Array
    entropy_coef_return: Array
    entropy_coef_max: Array
    coef: Array
    side: Array
    step: Array


def _side(state: EntropyBandState, entropy: Array) -> Array:
    """Why the guard acts at this entropy; once it does, until the entropy is past the margin inside the band."""
    low = state.entropy_low + jnp.where(state.side > 0, state.margin, 0.0)
    high = state.entropy_high - jnp.where(state.side < 0, state.margin, 0.0)
    return (entropy < low).astype(jnp.int32) - (entropy > high).astype(jnp.int32)


def control(state: EntropyBandState, entropy: Array) -> EntropyBandState:
    """The guard after it has seen the mean entropy of a new rollout, nats: which side it is on, and its coefficient."""
    side, delta = _side(state, entropy), state.entropy_coef_delta
    up = jnp.maximum(state.coef, 0.0) + delta
    down = jnp.minimum(state.coef, 0.0) - delta
    idle = jnp.sign(state.coef) * jnp.maximum(jnp.abs(state.coef) - state.entropy_coef_return, 0.0)
    coef = jnp.where(side > 0, up, jnp.where(side < 0, down, idle))
    return state._replace(coef=jnp.clip(coef, -state.entropy_coef_max, state.entropy_coef_max), side=side)


@dataclasses.dataclass(frozen=True)
class _Update:
    normaliser: Normaliser

    def __call__(
        self, plan: Plan, state: EntropyBandState, signals: Signals, key: Array
    ) -> tuple[Plan, EntropyBandState]:
        del key
        mask, dtype = signals.batch.loss_mask, plan.advantage.dtype
        total, count = stats.masked_sum(signals.scores["entropy"], mask), jnp.sum(mask, dtype=dtype)
        moved = control(state, (total / jnp.maximum(count, 1.0)).astype(state.coef.dtype))
        moved = moved._replace(step=signals.step.astype(jnp.int32))
        is_new = (signals.step != state.step) & (count > 0.0)
        state = EntropyBandState(*(jnp.where(is_new, new, old) for new, old in zip(moved, state)))
        weight = self.normaliser(mask, signals.batch)
        coef, one = state.coef.astype(weight.dtype), jnp.ones((), dtype)
        at_bound = (state.side != 0) & (jnp.abs(state.coef) >= state.entropy_coef_max)
        plan = plan.raise_term("entropy", -coef * weight).report(
            actor__entropy_coef=(coef, one),
            entropy_band__coef=(coef, one),
            entropy_band__entropy=(jnp.where(is_new, total, 0.0), jnp.where(is_new, count, 0.0)),
            entropy_band__below=((state.side > 0).astype(dtype), one),
            entropy_band__above=((state.side < 0).astype(dtype), one),
            entropy_band__at_bound=(at_bound.astype(dtype), one),
        )
        return plan, state


def entropy_band(
    *,
    entropy_low: float = 0.2,
    entropy_high: float = 1.0,
    margin: float = 0.05,
    entropy_coef_delta: float = 1e-4,
    entropy_coef_return: float | None = None,
    entropy_coef_max: float = 5e-3,
    normaliser: Normaliser = token_mean,
) -> Mechanism:
    """Subtracts `c_k · mean H_t` from the loss of rollout k, with c_k of either sign, to keep the entropy in a band.

        e_k < low:    c_k = min(max(c_{k-1}, 0) + Δ, c_max)       the entropy is pushed up
        e_k > high:   c_k = max(min(c_{k-1}, 0) - Δ, -c_max)      the entropy is pushed down
        else:         c_k returns towards 0, by Δ_return

    Once it acts it goes on until the entropy is back inside the band by the margin, so that noise at an end does not
    switch it. e_k is the token mean over the response tokens of the first update of rollout k that is
    seen: the guard acts in the rollout in which the entropy leaves the band. All updates of a rollout share c_k, which
    never pulls away from the band. A force that c_max cannot beat stays unbeaten: `entropy_band/at_bound` tells.

    Not from a paper: the controller of `adaptive_entropy`, which has one side and a target, made into a guard that does
    nothing to a run whose entropy is where it should be. Δ and c_max are those of Skywork-OR1's scripts (2505.22312).
    Reports why it acts as `entropy_band/below` and `entropy_band/above`, and e_k as `entropy_band/entropy`.

    Args:
      entropy_low: nats, finite and at least 0; 0 guards against explosion only.
      entropy_high: nats, above `entropy_low`; inf guards against collapse only.
      margin: nats, at least 0 and at most half of the band.
      entropy_coef_delta: Δ, finite and at least 0.
      entropy_coef_return: Δ_return, finite and at least 0; Δ by default. A smaller one keeps c wound up, and swings the
        entropy further across the band.
      entropy_coef_max: c_max, finite and at least 0; 0 is the identity.
      normaliser: how H is averaged in the loss.

    Raises:
      ValueError: a value is out of range.

    >>> entropy_band(entropy_low=0.3).update == entropy_band(entropy_coef_max=0.1).update
    True
    """
    low, high, bound = entropy_low, entropy_high, entropy_coef_max
    back = entropy_coef_delta if entropy_coef_return is None else entropy_coef_return
    require(0.0 <= low < float("inf"), "entropy_low", low, "finite and at least 0")
    require(high > low, "entropy_high", high, f"above entropy_low = {low!r}")
    require(0.0 <= margin <= (high - low) / 2.0, "margin", margin, f"in [0, {(high - low) / 2.0!r}], half of the band")
    require(0.0 <= entropy_coef_delta < float("inf"), "entropy_coef_delta", entropy_coef_delta, "finite and at least 0")
    require(0.0 <= back < float("inf"), "entropy_coef_return", back, "finite and at least 0")
    require(0.0 <= bound < float("inf"), "entropy_coef_max", bound, "finite and at least 0")

    def init() -> EntropyBandState:
        return EntropyBandState(
            entropy_low=hyper(low),
            entropy_high=hyper(high),
            margin=hyper(margin),
            entropy_coef_delta=hyper(entropy_coef_delta),
            entropy_coef_return=hyper(back),
            entropy_coef_max=hyper(bound),
            coef=hyper(0.0),
            side=jnp.int32(0),
            step=jnp.int32(-1),
        )

    return Mechanism(
        init=init,
        update=_Update(normaliser),
        outputs=(ENTROPY,),
        terms={"entropy": quantity("entropy")},
    )

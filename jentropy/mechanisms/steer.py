"""STEER: tokens that would change the entropy most weigh less."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jentropy import stats
from jentropy.base import ENTROPY, Array, Mechanism, Plan, Signals, hyper, require


class SteerState(NamedTuple):
    """The smallest and the largest weight, scalars."""

    weight_min: Array
    weight_max: Array


_LEAST_PROBABILITY = 1e-8
_LEAST_MAXIMUM = 0.02


def entropy_change(plan: Plan, signals: Signals) -> Array:
    """`A / π_old · π (1 - π) (log π + H)` `[B, T]`, above 0 where the entropy would fall; 0 outside the mask."""
    mask, batch = signals.batch.loss_mask, signals.batch

    def select(x: Array) -> Array:
        return jnp.where(mask, x, 0.0)

    probability = jnp.clip(jnp.exp(select(signals.scores["log_prob"])), _LEAST_PROBABILITY, 1.0 - _LEAST_PROBABILITY)
    old = jnp.clip(jnp.exp(select(batch.logp_old)), _LEAST_PROBABILITY, 1.0)
    surplus = jnp.log(probability) + select(signals.scores["entropy"])
    change = select(plan.advantage) / old * probability * (1.0 - probability) * surplus
    return jnp.where(jnp.isfinite(change), change, 0.0)


@dataclasses.dataclass(frozen=True)
class _Update:
    mapping: str
    mode: str

    def __call__(self, plan: Plan, state: SteerState, signals: Signals, key: Array) -> tuple[Plan, SteerState]:
        del key
        mask, dtype = signals.batch.loss_mask, plan.pg_weight.dtype
        low, high = state.weight_min.astype(dtype), state.weight_max.astype(dtype)
        change = entropy_change(plan, signals).astype(dtype)
        if self.mode == "symmetric":
            change = jnp.abs(change)
        weight = (self._linear if self.mapping == "linear" else self._exponential)(change, mask, low, high)
        plan = plan.replace(pg_weight=jnp.where(mask, plan.pg_weight * weight, 0.0))
        num_tokens = jnp.sum(mask, dtype=dtype)
        plan = plan.report(
            steer__weight_mean=(stats.masked_sum(weight, mask), num_tokens),
            steer__entropy_change_mean=(stats.masked_sum(change, mask), num_tokens),
        )
        return plan, state

    def _linear(self, change: Array, mask: Array, low: Array, high: Array) -> Array:
        least = jnp.min(jnp.where(mask, change, jnp.inf))
        width = jnp.max(jnp.where(mask, change, -jnp.inf)) - least
        varies = width > 0.0
        share = jnp.where(mask & varies, change - least, 0.0) / jnp.where(varies, width, 1.0)
        return jnp.where(varies, jnp.clip(high - share * (high - low), low, high), (low + high) / 2.0)

    def _exponential(self, change: Array, mask: Array, low: Array, high: Array) -> Array:
        largest = jnp.max(jnp.where(mask, jnp.abs(change), 0.0))
        weight = jnp.exp(jnp.log(low) * change / jnp.maximum(largest, _LEAST_MAXIMUM))
        return jnp.clip(weight, low, high if self.mode == "asymmetric" else 1.0)


def steer(
    *, weight_min: float = 0.8, weight_max: float = 1.2, mapping: str = "linear", mode: str = "symmetric"
) -> Mechanism:
    """Multiplies the policy-gradient loss of each token by a weight that falls with its estimated change of entropy.

        Ω_t = |A_t / π_old · π (1 - π) (log π + H_t)|
        linear:       w_t = weight_max - (weight_max - weight_min) (Ω_t - min Ω) / (max Ω - min Ω)
        exponential:  w_t = exp(-k Ω_t),   k = -log(weight_min) / max(max Ω, 0.02)

    π and H are of the current policy, without gradient; minimum and maximum are over the response tokens of the batch.
    Tokens that raise the entropy are damped as those that lower it are; with `mode="asymmetric"` Ω keeps its sign, so
    that the strongest lowering gets the smallest weight and the strongest raising the largest. If all Ω are equal, the
    linear weight is the middle of the two. Probabilities are clipped to at least 1e-8, as released.

    The released code takes minimum and maximum per micro-batch: see `compose.blockwise`. Its scripts have
    `clip_range(epsilon_high=0.28)` and `dual_clip(clip_ratio_c=10.0)`.

    Args:
      weight_min: in (0, 1]; the paper's λ_min.
      weight_max: at least 1, finite; not used by the symmetric exponential mapping. Both 1: the identity.
      mapping: `"linear"` or `"exponential"`.
      mode: `"symmetric"` or `"asymmetric"`.

    Returns:
      A mechanism that reports `steer/weight_mean` and `steer/entropy_change_mean` over response tokens; the latter is
      above 0 where entropy would fall, or the mean of Ω in the symmetric mode.

    Raises:
      ValueError: a value is out of range or unknown.

    Reference: 2510.10150; released code: zz-haooo/STEER.

    >>> steer(weight_min=0.5).update == steer(weight_max=1.5).update
    True
    """
    require(0.0 < weight_min <= 1.0, "weight_min", weight_min, "in (0, 1]")
    require(1.0 <= weight_max < float("inf"), "weight_max", weight_max, "finite and at least 1")
    require(mapping in ("linear", "exponential"), "mapping", mapping, "linear or exponential")
    require(mode in ("symmetric", "asymmetric"), "mode", mode, "symmetric or asymmetric")
    return Mechanism(
        init=lambda: SteerState(hyper(weight_min), hyper(weight_max)),
        update=_Update(mapping, mode),
        outputs=(ENTROPY,),
    )

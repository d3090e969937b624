"""An entropy bonus whose coefficient a controller moves, once per rollout, to keep the entropy at a target."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jentropy import stats
from jentropy.base import ENTROPY, Array, Mechanism, Normaliser, Plan, Signals, hyper, require
from jentropy.compose import quantity
from jentropy.normalisers import token_mean


class AdaptiveEntropyState(NamedTuple):
    """Numbers of the method, then the controller's own state; scalars.

    Attributes:
      entropy_target: H*, nats; below 0 until it is known.
      target_fraction: what H* is of the first entropy, where that sets it.
      entropy_coef_delta: step of the coefficient.
      entropy_coef_min: its lower bound.
      entropy_coef_max: its upper bound.
      coef: c, the coefficient.
      enabled: bool, whether it is applied.
      entropy_sum: over the tokens of the updates seen of this rollout.
      num_tokens: their number.
      step: int32, the rollout of these updates.
    """

    entropy_target: Array
    target_fraction: Array
    entropy_coef_delta: Array
    entropy_coef_min: Array
    entropy_coef_max: Array
    coef: Array
    enabled: Array
    entropy_sum: Array
    num_tokens: Array
    step: Array


def _known_target(state: AdaptiveEntropyState, entropy: Array) -> Array:
    return jnp.where(state.entropy_target < 0.0, state.target_fraction * entropy, state.entropy_target)


def _move(state: AdaptiveEntropyState, target: Array, low: Array) -> AdaptiveEntropyState:
    coef = state.coef + jnp.where(low, state.entropy_coef_delta, -state.entropy_coef_delta)
    coef = jnp.clip(coef, state.entropy_coef_min, state.entropy_coef_max)
    return state._replace(entropy_target=target, coef=coef, enabled=low)


def skywork(state: AdaptiveEntropyState, entropy: Array) -> AdaptiveEntropyState:
    """After a rollout of this mean entropy, nats: c + Δ and on if it is below the target, else c - Δ and off."""
    target = _known_target(state, entropy)
    return _move(state, target, entropy < target)


def trl(state: AdaptiveEntropyState, entropy: Array) -> AdaptiveEntropyState:
    """As `skywork`, but an entropy at the target counts as below it."""
    target = _known_target(state, entropy)
    return _move(state, target, entropy <= target)


_RULES: dict[str, Callable[[AdaptiveEntropyState, Array], AdaptiveEntropyState]] = {"skywork": skywork, "trl": trl}


@dataclasses.dataclass(frozen=True)
class _Update:
    rule: str
    entropy_estimate: str
    normaliser: Normaliser

    def _begin(self, state: AdaptiveEntropyState, step: Array) -> AdaptiveEntropyState:
        """The state for this rollout: the controller moves at the first update of it that is seen."""
        moved = _RULES[self.rule](state, state.entropy_sum / jnp.maximum(state.num_tokens, 1.0))
        zero = jnp.zeros_like(state.entropy_sum)
        moved = moved._replace(entropy_sum=zero, num_tokens=zero)
        is_new = (step != state.step) & (state.num_tokens > 0.0)
        state = jax.tree.map(lambda new, old: jnp.where(is_new, new, old), moved, state)
        return state._replace(step=step.astype(jnp.int32))

    def __call__(
        self, plan: Plan, state: AdaptiveEntropyState, signals: Signals, key: Array
    ) -> tuple[Plan, AdaptiveEntropyState]:
        del key
        batch, dtype = signals.batch, plan.advantage.dtype
        state = self._begin(state, signals.step)
        weight = self.normaliser(batch.loss_mask, batch)
        applied = jnp.where(state.enabled, state.coef, 0.0).astype(weight.dtype)
        values = signals.scores["entropy"] if self.entropy_estimate == "full" else -batch.logp_old
        total, count = stats.masked_sum(values, batch.loss_mask), jnp.sum(batch.loss_mask, dtype=dtype)
        plan = plan.raise_term("entropy", -applied * weight).report(
            actor__entropy_coef=(applied, jnp.ones_like(applied)),
            adaptive_entropy__coef=(state.coef.astype(dtype), jnp.ones((), dtype)),
            adaptive_entropy__entropy=(total, count),
        )
        state = state._replace(
            entropy_sum=state.entropy_sum + total.astype(state.entropy_sum.dtype),
            num_tokens=state.num_tokens + count.astype(state.num_tokens.dtype),
        )
        return plan, state


def adaptive_entropy(
    *,
    entropy_target: float | str = 0.2,
    target_fraction: float = 1.0,
    entropy_coef_init: float = 0.0,
    entropy_coef_delta: float = 1e-4,
    entropy_coef_min: float = 0.0,
    entropy_coef_max: float = 5e-3,
    rule: str = "skywork",
    entropy_estimate: str = "full",
    normaliser: Normaliser = token_mean,
) -> Mechanism:
    """Subtracts `α_k · mean H_t` from the loss of rollout k, with α_k from the entropies of the rollouts before it.

        c_k = clip(c_{k-1} + Δ if e_{k-1} < H* else c_{k-1} - Δ, min, max),   α_k = c_k if e_{k-1} < H* else 0

    e_k is the token mean over all updates of rollout k, over all response tokens; the gradient is that of the entropy
    of the whole distribution, whichever estimate the controller sees. The controller moves at the first update that is
    seen of a new rollout, and all updates of a rollout share one coefficient; a rollout whose updates are all skipped
    moves nothing. While the entropy is above the target c falls but is not applied; a reward gradient that the bonus
    cannot beat winds it up: set the maximum with care.

    `"skywork"` is the released rule: strict, c and α of the first rollout are `entropy_coef_init`. `"trl"` is
    inclusive, `e <= H*`, and applies nothing in the first rollout. The paper applies c_k if e_k <= H*, without the lag
    of one rollout that both codes have, and leaves c as it is at e_k = H*. Skywork's controller sees `"sampled"`; its
    scripts have these defaults, its config file Δ 1e-3 and maximum .5. TRL moves at every optimizer step, and its
    initial value is .01, Δ .005, its maximum 1. Known as `adaptive_entropy.{target_entropy, delta_ent_coef,
    min_ent_coef, max_ent_coef}` (Skywork), `use_adaptive_entropy` and the names used here (TRL).

    Args:
      entropy_target: H*, nats, finite and at least 0; or `"first_batch"`: set by the first rollout.
      target_fraction: H* over the entropy of the first rollout, finite and above 0; for `"first_batch"` only.
      entropy_coef_init: c of the first rollout, in [minimum, maximum].
      entropy_coef_delta: Δ, finite and at least 0.
      entropy_coef_min: at least 0.
      entropy_coef_max: finite and at least the minimum; 0 is the identity.
      rule: `"skywork"` or `"trl"`.
      entropy_estimate: what the controller sees: `"full"`, the entropy of the whole distribution, or `"sampled"`,
        `-logp_old` of the sampled tokens.
      normaliser: how H is averaged in the loss.

    Raises:
      ValueError: a value is out of range.

    Reference: 2505.22312.

    >>> adaptive_entropy(entropy_target=0.3).update == adaptive_entropy(entropy_coef_delta=1e-3).update
    True
    """
    first = entropy_target == "first_batch"
    fixed = isinstance(entropy_target, float | int) and 0.0 <= entropy_target < float("inf")
    require(first or fixed, "entropy_target", entropy_target, "finite and at least 0, or 'first_batch'")
    target = -1.0 if isinstance(entropy_target, str) else entropy_target
    low, high = entropy_coef_min, entropy_coef_max
    require(0.0 < target_fraction < float("inf"), "target_fraction", target_fraction, "finite and above 0")
    require(0.0 <= entropy_coef_delta < float("inf"), "entropy_coef_delta", entropy_coef_delta, "finite and at least 0")
    require(low >= 0.0, "entropy_coef_min", low, "at least 0")
    require(low <= high < float("inf"), "entropy_coef_max", high, f"finite and at least entropy_coef_min = {low!r}")
    require(low <= entropy_coef_init <= high, "entropy_coef_init", entropy_coef_init, f"in [{low!r}, {high!r}]")
    require(rule in _RULES, "rule", rule, f"one of {sorted(_RULES)}")
    require(entropy_estimate in ("full", "sampled"), "entropy_estimate", entropy_estimate, "full or sampled")

    def init() -> AdaptiveEntropyState:
        return AdaptiveEntropyState(
            entropy_target=hyper(target),
            target_fraction=hyper(target_fraction),
            entropy_coef_delta=hyper(entropy_coef_delta),
            entropy_coef_min=hyper(low),
            entropy_coef_max=hyper(high),
            coef=hyper(entropy_coef_init),
            enabled=jnp.asarray(rule == "skywork"),
            entropy_sum=hyper(0.0),
            num_tokens=hyper(0.0),
            step=jnp.int32(-1),
        )

    return Mechanism(
        init=init,
        update=_Update(rule, entropy_estimate, normaliser),
        outputs=(ENTROPY,),
        terms={"entropy": quantity("entropy")},
    )

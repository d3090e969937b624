"""The critic of PPO: a value of every state, learned from the returns."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import chex
import jax.numpy as jnp

from jentropy import fitting, ratios
from jentropy.base import Array, Learner, Metrics, Normaliser, Rollouts, hyper, require
from jentropy.normalisers import token_mean

ValueFunction: TypeAlias = Callable[[Any, Array], Array]


class CriticState(NamedTuple):
    """Parameters, the optimizer's state, and how far a value may move from the one before, a scalar."""

    params: Any
    opt_state: Any
    cliprange_value: Array


def value_loss(
    value: Array, value_old: Array, returns: Array, mask: Array, cliprange_value: Array
) -> tuple[Array, Array]:
    """½ max((V - R)², (clip(V, V_old - c, V_old + c) - R)²) per token, and where the second is the larger one.

    There the gradient is 0: a value that has moved c away from R's side of the old value moves no further.

    Args:
      value: `[B, T]` V, differentiable.
      value_old: `[B, T]` float, at the start of the rollout's updates.
      returns: `[B, T]` float, R.
      mask: `[B, T]` bool.
      cliprange_value: c, a float scalar above 0; inf clips nothing.

    Returns:
      `[B, T]` float and `[B, T]` bool, 0 and False outside the mask.
    """
    chex.assert_rank([value, value_old, returns, mask, cliprange_value], [2, 2, 2, 2, 0])
    chex.assert_equal_shape([value, value_old, returns, mask])
    value, value_old, returns = (jnp.where(mask, x, 0.0) for x in (value, value_old, returns))
    bound = cliprange_value.astype(value.dtype)
    straight = jnp.square(value - returns)
    clipped = jnp.square(ratios.clip(value, value_old - bound, value_old + bound) - returns)
    larger = clipped > straight
    return 0.5 * jnp.where(larger, clipped, straight), larger


@dataclasses.dataclass(frozen=True)
class _Init:
    init: Callable[[Array, Any], Any]
    optimizer: fitting.Optimizer
    cliprange_value: float

    def __call__(self, key: Array, params: Any) -> CriticState:
        return CriticState(*fitting.start(self.optimizer, self.init(key, params)), hyper(self.cliprange_value))


@dataclasses.dataclass(frozen=True)
class _Annotate:
    value: ValueFunction
    num_pieces: int

    def __call__(self, state: CriticState, rollouts: Rollouts) -> Mapping[str, Array]:
        found = fitting.in_pieces(lambda tokens: self.value(state.params, tokens), rollouts.tokens, self.num_pieces)
        return {"value": jnp.where(rollouts.loss_mask, found.astype(rollouts.logp_old.dtype), 0.0)}


@dataclasses.dataclass(frozen=True)
class _Update:
    value: ValueFunction
    optimizer: fitting.Optimizer
    normaliser: Normaliser
    passes: fitting.Passes

    def _weigh(self, rows: Rollouts) -> Array:
        return self.normaliser(rows.loss_mask, rows)

    def __call__(self, state: CriticState, rollouts: Rollouts, key: Array) -> tuple[CriticState, Metrics]:
        for name in ("value", "return"):
            fitting.needed(rollouts.token_data, name, "the critic")

        def loss(params: Any, rows: Rollouts, weight: Array) -> tuple[Array, Metrics]:
            old, returns, mask = rows.token_data["value"], rows.token_data["return"], rows.loss_mask
            new = jnp.where(mask, self.value(params, rows.tokens).astype(old.dtype), 0.0)
            token_loss, clipped = value_loss(new, old, returns, mask, state.cliprange_value)
            num_tokens = jnp.sum(mask, dtype=old.dtype)
            metrics = {
                "vf_clipfrac": (jnp.sum(clipped, dtype=old.dtype), num_tokens),
                "vpred_mean": (jnp.sum(new), num_tokens),
            }
            return jnp.sum(weight * token_loss), metrics

        before = fitting.Fitted(state.params, state.opt_state)
        after, metrics = fitting.fit(loss, self._weigh, self.optimizer, self.passes, before, rollouts, key)
        metrics = {f"critic/{'vf_loss' if name == 'loss' else name}": pair for name, pair in metrics.items()}
        return state._replace(params=after.params, opt_state=after.opt_state), metrics


def critic(
    *,
    init: Callable[[Array, Any], Any],
    value: ValueFunction,
    optimizer: fitting.Optimizer,
    cliprange_value: float = 0.5,
    normaliser: Normaliser = token_mean,
    num_epochs: int = 1,
    num_minibatches: int = 1,
    num_microbatches: int = 1,
) -> Learner:
    """A value function with its own parameters and optimizer.

    `annotate` gives `token_data["value"]`, which `advantages.gae` makes `token_data["return"]` of, and `update` then
    needs both:

        L = Σ_t w_t · ½ max((V_t - R_t)², (clip(V_t, V_old_t - c, V_old_t + c) - R_t)²)

    with V_old what `annotate` gave and w of the whole mini-batch, so that micro-batches change nothing. Every epoch
    deals the rows out anew (`fitting.minibatches`). Reports `critic/vf_loss` (mean over updates), `critic/vf_clipfrac`
    and `critic/vpred_mean` (over tokens), `critic/grad_norm`, and `critic/skipped`, the updates that were not finite.

    Args:
      init: `(key, params of the policy) -> params`.
      value: `(params, tokens [B, T]) -> [B, T]`: column t is the value of the state before token t, a function of the
        tokens before it. From hidden states that is the head on `hidden[:, t - 1]`.
      optimizer: such as an `optax.GradientTransformation`.
      cliprange_value: c, above 0; inf clips nothing. 0.5 in verl and PRIME, 0.2 in VinePPO.
      normaliser: gives w, on the response tokens of valid rows.
      num_epochs: passes over a rollout. verl: `critic.ppo_epochs`.
      num_minibatches: updates of a pass.
      num_microbatches: pieces whose gradients are summed, and pieces of `annotate`: for memory only.

    Raises:
      ValueError: a value is out of range or, when traced, `value` or `return` is missing.

    Reference: 1707.06347, section 5; the clipped loss: released code, verl 0.9.1, `compute_value_loss`.

    >>> import jax, optax
    >>> learner = critic(init=lambda key, _: jnp.zeros(1), value=lambda w, x: w + 0.0 * x, optimizer=optax.sgd(0.1))
    >>> learner.init(jax.random.key(0), None).params
    Array([0.], dtype=float32)
    """
    require(cliprange_value > 0.0, "cliprange_value", cliprange_value, "above 0")
    passes = fitting.Passes(num_epochs, num_minibatches, num_microbatches)

    return Learner(
        init=_Init(init, optimizer, cliprange_value),
        annotate=_Annotate(value, num_microbatches),
        update=_Update(value, optimizer, normaliser, passes),
    )

"""A temperature that is steered from rollout to rollout: the controller of E3, as pure functions of scalars.

Every array is a scalar, a float or an int32. See `samplers.e3_temperature` for the formula and the source.
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp

from jentropy.base import Array


class E3State(NamedTuple):
    """What the controller has seen, and its numbers.

    Attributes:
      step: int32, rollouts so far.
      temperature: of the next rollout, from the second one on.
      total: sum of the entropies of the first `init_steps` rollouts.
      target: H*, if `given`; else the mean of those entropies is.
      given: bool.
      scale: ln V + ln ln V.
      init_steps: int32, rollouts that change nothing.
      begin, span: int32, the rollout after which annealing begins, and the number of rollouts it takes.
      final: factor of the target at the end of annealing.
      low, high: bounds of the temperature.
      min_entropy: lower bound of a measured entropy.
    """

    step: Array
    temperature: Array
    total: Array
    target: Array
    given: Array
    scale: Array
    init_steps: Array
    begin: Array
    span: Array
    final: Array
    low: Array
    high: Array
    min_entropy: Array


def e3_update(temperature: Array, entropy: Array, target: Array, scale: Array) -> Array:
    """`T (1 + T ln(H* / H) / scale)`, without bounds."""
    chex.assert_rank([temperature, entropy, target, scale], 0)
    return temperature * (1 + temperature * jnp.log(target / entropy) / scale)


def e3_target(state: E3State, total: Array, step: Array) -> Array:
    """H* of the update after rollout number `step`, which counts from 1; annealing lags by one, as released."""
    dtype, before = total.dtype, step - 1
    target = jnp.where(state.given, state.target, total / state.init_steps.astype(dtype))
    progress = jnp.clip((before - state.begin).astype(dtype) / state.span.astype(dtype), 0.0, 1.0)
    factor = (1 - state.final) * (0.5 * (1 + jnp.cos(jnp.pi * progress))) + state.final
    return jnp.where((before >= state.begin) & (before > state.init_steps), target * factor, target)


def e3_step(state: E3State, entropy: Array, first: Array) -> E3State:
    """The state after a rollout of mean token entropy `entropy`, nats; `first` is the temperature of the first one."""
    dtype, step = state.temperature.dtype, state.step + 1
    entropy = jnp.maximum(entropy.astype(dtype), state.min_entropy)
    recorded = step <= state.init_steps
    total = jnp.where(recorded, state.total + entropy, state.total)
    before = jnp.where(state.step == 0, first.astype(dtype), state.temperature)
    after = e3_update(before, entropy, e3_target(state, total, step), state.scale)
    after = jnp.where(recorded, before, jnp.clip(after, state.low, state.high))
    return state._replace(step=step, temperature=after, total=total)

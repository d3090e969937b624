"""A mechanism that puts a NaN or an infinity in the loss or the gradient of a chosen rollout, from a config.

    objective = embedded.objective({"poison": fdl.Config(poison, step=4, where="gradient", value="inf")})

It raises a term whose value and derivative are read from the plan, 0 everywhere but where it strikes. Settings are
arrays in the state, so a run that is never struck (`step=-1`) runs the very program of one that is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jentropy.base import Array, Mechanism, Plan, Quantities, Rollouts, Signals, hyper, require


class PoisonState(NamedTuple):
    """Scalars: the settings of `poison`, and the number for each place."""

    step: Array
    num_steps: Array
    update_index: Array
    row: Array
    in_loss: Array
    in_gradient: Array


@jax.custom_vjp
def _poisoned(log_prob: Array, in_loss: Array, in_gradient: Array) -> Array:
    """Of value `in_loss` and derivative `in_gradient` with respect to `log_prob`."""
    del log_prob, in_gradient
    return in_loss


def _forward(log_prob: Array, in_loss: Array, in_gradient: Array) -> tuple[Array, Array]:
    del log_prob
    return in_loss, in_gradient


def _backward(in_gradient: Array, cotangent: Array) -> tuple[Array, Array, Array]:
    return cotangent * in_gradient, jnp.zeros_like(cotangent), jnp.zeros_like(cotangent)


_poisoned.defvjp(_forward, _backward)


def _term(quantities: Quantities, plan: Plan, batch: Rollouts) -> Array:
    del batch
    return _poisoned(quantities["log_prob"], plan.constants["poison_loss"], plan.constants["poison_gradient"])


def _update(plan: Plan, state: PoisonState, signals: Signals, key: Array) -> tuple[Plan, PoisonState]:
    del key
    batch, dtype = signals.batch, plan.advantage.dtype
    now = (signals.step >= state.step) & (signals.step < state.step + state.num_steps)
    now &= (state.update_index < 0) | (signals.update_index == state.update_index)
    here = now & batch.loss_mask & ((state.row < 0) | (batch.row_id == state.row))[:, None]
    constants = {
        "poison_loss": jnp.where(here, state.in_loss.astype(dtype), 0.0),
        "poison_gradient": jnp.where(here, state.in_gradient.astype(dtype), 0.0),
    }
    plan = plan.raise_term("poison", batch.loss_mask.astype(dtype))
    return plan.replace(constants={**plan.constants, **constants}), state


def poison(
    *, step: int = -1, num_steps: int = 1, update_index: int = -1, row: int = -1, where: str = "gradient",
    value: str = "nan",
) -> Mechanism:  # fmt: skip
    """Strikes `num_steps` rollouts from `step` on (-1: none): there one update (-1: all), there one row (-1: all).

    Args:
      step: the run's number of the first rollout.
      num_steps: rollouts.
      update_index: of the update within its rollout.
      row: id of the row; updates without it stay healthy.
      where: "gradient", with a finite loss, or "loss", with a finite gradient.
      value: "nan", "inf" or "-inf".
    """
    require(where in ("gradient", "loss"), "where", where, "'gradient' or 'loss'")
    require(value in ("nan", "inf", "-inf"), "value", value, "'nan', 'inf' or '-inf'")
    number = float(value)

    def init() -> PoisonState:
        integers = (jnp.int32(i) for i in (step, num_steps if step >= 0 else 0, update_index, row))
        return PoisonState(*integers, hyper(number if where == "loss" else 0.0),
                           hyper(number if where == "gradient" else 0.0))  # fmt: skip

    return Mechanism(init, _update, terms={"poison": _term})

"""The compiled programs of what-if: directions of one update by several methods, and the entropy change of a step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jentropy import compose, stats
from jentropy.base import Array, Metrics, Plan, Quantities, Rollouts, Signals, initial_plan
from jentropy.train import step as step_lib
from jentropy.train.entropy_derivative import entropy_derivative
from jentropy.train.learning import annotate
from jentropy.train.ledger import entropy_changes
from jentropy.train.optimizer import propose
from jentropy.train.sharding import constrain_rows
from jentropy.train.state import TrainState
from jentropy.train.step import StepSpec


def _without(token: int | None, rows: Rollouts) -> Rollouts:
    """The rows without `token` in the loss mask."""
    return rows if token is None else rows.replace(loss_mask=rows.loss_mask & (rows.tokens != token))


class _Direction(NamedTuple):
    loss: Array
    gradient: Any
    update: Any
    touched: Mapping[str, Array]
    errors: Metrics


def _direction(
    spec: StepSpec, state: TrainState, rows: Rollouts, scores: Quantities, pull: step_lib.Pullback
) -> _Direction:
    """One update over all rows at ratio 1."""
    rows, _, _ = annotate(spec.learners, state, _without(spec.left_out, rows))
    advantage, token_data, metrics, _ = spec.estimate(rows, state.estimator_state)
    rows = rows.replace(token_data={**rows.token_data, **token_data})
    scores = {name: jnp.where(rows.loss_mask, scores[name], 0.0) for name in map(str, spec.outputs)}
    signals = Signals(batch=rows, scores=scores, step=state.step, update_index=jnp.int32(0))
    key, mechanism_state = step_lib.step_key(state), state.mechanism_state
    plan, weight, _ = step_lib.plan_update(spec, mechanism_state, signals, advantage, key)
    start = initial_plan(rows, advantage)
    touched = compose.walk(spec.update, start, mechanism_state, signals, key)[2]

    def loss_of(q: Quantities, parts: tuple[Plan, Array, Rollouts]) -> tuple[Array, Metrics]:
        part_plan, part_weight, part_rows = parts
        return step_lib.loss(spec, q, part_plan, part_weight, part_rows, jnp.bool_(True))

    gradient, value, _ = pull(loss_of, (plan.replace(metrics={}), weight, rows))
    update = propose(spec.optimizer, gradient, state.opt_state, state.params)[0]
    errors = {name: value for name, value in {**metrics, **plan.metrics}.items() if name.startswith("error/")}
    return _Direction(value, gradient, update, touched, errors)


def _cosine(a: Any, b: Any) -> Array:
    """Of two trees; NaN if one is 0."""
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    cosine = optax.tree.vdot(a, b) / jnp.where(norms > 0, norms, 1)
    return jnp.where(norms > 0, jnp.clip(cosine, -1, 1), jnp.nan)


@functools.lru_cache
def make_directions(
    specs: tuple[StepSpec, ...], own: StepSpec, mesh: Mesh
) -> Callable[[tuple[TrainState, ...], Rollouts], dict[str, Any]]:
    """The jitted `(states, rollouts) -> findings`; one program for all methods, with one forward pass.

    Args:
      specs: of the methods, that of plain GRPO first; they share policy, temperature and number of micro-batches.
      own: the run's, whose tokens the entropy is that of.
      mesh: devices; rows of the rollout are sharded over them.
    """
    outputs = tuple(dict.fromkeys(output for spec in specs for output in spec.outputs))
    union = own._replace(outputs=outputs, reference=any(spec.reference for spec in specs), left_out=None)

    @jax.jit
    def directions(states: tuple[TrainState, ...], rollouts: Rollouts) -> dict[str, Any]:
        state = max(states, key=lambda state: len(state.frozen))
        rows = step_lib.step_rows(union, state, rollouts, mesh)
        scores, pull = step_lib.forward(union, state.params, state.frozen, rows)
        rows = rows.replace(logp_old=scores["log_prob"])
        found = [_direction(spec, s, rows, scores, pull) for spec, s in zip(specs, states, strict=True)]
        own_rows = _without(own.left_out, rows)
        mask = own_rows.loss_mask
        count = stats.count_true(mask).astype(scores["log_prob"].dtype)

        def slope(tangent: Any) -> Array:
            where = own_rows, own.temperature
            return entropy_derivative(own.policy, state.params, tangent, *where, num_microbatches=own.num_microbatches)

        def share(mark: Array) -> Array:
            return stats.count_true(mark & mask).astype(count.dtype) / jnp.maximum(count, 1)

        updates = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.update for one in found))
        predicted = jax.lax.map(slope, updates)
        first = found[0]
        return {
            "count": count,
            "entropy": stats.masked_mean(scores["entropy"], mask),
            "loss": [one.loss for one in found],
            "gradient_norm": [optax.tree.norm(one.gradient) for one in found],
            "predicted_tokens": predicted,
            "predicted": jnp.sum(predicted, axis=(1, 2)) / jnp.maximum(count, 1),
            "cosine_gradient": [_cosine(one.gradient, first.gradient) for one in found],
            "cosine_update": [_cosine(one.update, first.update) for one in found],
            "touched": [{name: share(mark) for name, mark in one.touched.items()} for one in found],
            "errors": [one.errors for one in found],
        }

    return directions


@functools.lru_cache
def make_measure(own: StepSpec, mesh: Mesh) -> Callable[[Any, Any, Rollouts], Array]:
    """The jitted `(params before, params after, rollouts) -> mean entropy change` on the rollout's tokens, nats."""

    @jax.jit
    def measure(before: Any, after: Any, rollouts: Rollouts) -> Array:
        rows = _without(own.left_out, constrain_rows(rollouts, mesh))
        changes = entropy_changes(own.policy, before, after, rows, own.temperature, own.num_microbatches)
        return stats.masked_mean(changes["entropy_change"], rows.loss_mask)

    return measure

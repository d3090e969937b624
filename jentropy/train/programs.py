"""The other compiled programs of a run: sampling with grading, and the supervised step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jentropy import head
from jentropy.base import Array, Policy, Rollouts
from jentropy.rollout.iid import RolloutSpec, iid_rollouts
from jentropy.train.optimizer import AdamW, make_optimizer
from jentropy.train.sharding import constrain_rows

SAMPLING, UPDATES, EVALUATION = range(3)
"""First word folded into the run's key, by purpose."""


def stream(key: Array, purpose: int, step: Array) -> Array:
    """The key of a purpose at a step: `fold_in(fold_in(key, purpose), step)`."""
    return jax.random.fold_in(jax.random.fold_in(key, purpose), step)


@functools.lru_cache
def make_rollout(policy: Policy, spec: RolloutSpec, purpose: int, mesh: Mesh) -> Callable[..., tuple[Rollouts, Array]]:
    """The jitted `(params, key, step, prompts, length, fields) -> (rollouts, entropy [B, T])`.

    Args:
      policy: the model.
      spec: what to sample.
      purpose: the stream of randomness, `SAMPLING` or `EVALUATION`.
      mesh: devices; prompts are sharded over its rows.
    """

    @jax.jit
    def rollout(
        params: Any, key: Array, step: Array, prompts: Array, length: Array, fields: Mapping[str, Array]
    ) -> tuple[Rollouts, Array]:
        rows = constrain_rows((prompts, length, fields), mesh)
        return constrain_rows(iid_rollouts(policy, params, *rows, stream(key, purpose, step), spec=spec), mesh)

    return rollout


@functools.lru_cache
def make_supervised_step(policy: Policy, optimizer: AdamW, mesh: Mesh) -> Callable[..., tuple[Any, Any, Array]]:
    """The jitted `(params, opt_state, tokens [B, T], weight [B, T]) -> (params, opt_state, loss)`; the first two donated.

    The loss is `-Σ weight · log π / Σ weight`, nats per token. A step whose loss or gradient is not finite changes
    nothing.
    """

    def loss_of(params: Any, tokens: Array, weight: Array) -> Array:
        hidden = policy.hidden(params, tokens)[:, :-1]
        log_prob = head.linear_scores(hidden, policy.unembed(params), tokens[:, 1:]).log_prob
        weight = weight[:, 1:]
        return -jnp.sum(jnp.where(weight != 0, weight * log_prob, 0.0)) / jnp.maximum(jnp.sum(weight), 1e-6)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def supervised_step(params: Any, opt_state: Any, tokens: Array, weight: Array) -> tuple[Any, Any, Array]:
        tokens, weight = constrain_rows((tokens, weight), mesh)
        loss, gradient = jax.value_and_grad(loss_of)(params, tokens, weight)

        def apply() -> tuple[Any, Any]:
            with jax.numpy_dtype_promotion("standard"):
                updates, new = make_optimizer(optimizer).update(gradient, opt_state, params)
                return optax.apply_updates(params, updates), new

        ok = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        params, opt_state = jax.lax.cond(ok, apply, lambda: (params, opt_state))
        return params, opt_state, loss

    return supervised_step

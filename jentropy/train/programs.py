"""The other compiled programs of a run: sampling with grading, and the supervised step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jentropy import head
from jentropy.base import Array, Policy, Rollouts, State
from jentropy.rollout.forks import Prefixes, continued_rollouts
from jentropy.rollout.iid import ON_DEMAND, RolloutSpec, iid_rollouts
from jentropy.samplers import compiled_part
from jentropy.train.optimizer import AdamW, apply_optimizer
from jentropy.train.sharding import constrain_rows, param_shardings
from jentropy.train.state import optimizer_shardings

SAMPLING, EVALUATION = 0, 2
"""What is folded into the run's key, by purpose; 1 is that of updates."""


def make_rollout(policy: Policy, spec: RolloutSpec, mesh: Mesh) -> Callable[..., tuple[Rollouts, Array]]:
    """The jitted `(params, key, index, prompts, length, fields, decode_state=()) -> (rollouts, entropy [B, T])`.

    The randomness is that of `fold_in(key, index)`; `key` is the run's with a purpose folded in. Samplers that differ
    in numbers only share a program, and so do methods that require the same of what is made on demand.

    Args:
      policy: the model.
      spec: what to sample.
      mesh: devices; prompts are sharded over its rows.
    """
    spec = spec._replace(sampler=compiled_part(spec.sampler), required=spec.required & ON_DEMAND)
    return _make_rollout(policy, spec, mesh)


@functools.lru_cache
def _make_rollout(policy: Policy, spec: RolloutSpec, mesh: Mesh) -> Callable[..., tuple[Rollouts, Array]]:
    @jax.jit
    def rollout(
        params: Any, key: Array, index: Array, prompts: Array, length: Array, fields: Mapping[str, Array],
        decode_state: State = (),
    ) -> tuple[Rollouts, Array]:  # fmt: skip
        prompts, length, fields = constrain_rows((prompts, length, fields), mesh)
        key = jax.random.fold_in(key, index)
        found = iid_rollouts(policy, params, prompts, length, fields, key, decode_state, spec=spec)
        return constrain_rows(found, mesh)

    return rollout


def make_growth(policy: Policy, spec: RolloutSpec, mesh: Mesh) -> Callable[..., Rollouts]:
    """The jitted `(params, key, index, prefixes, owner, fields, first_row, decode_state) -> rollouts`.

    Samples and grades continuations of S prefixes; see `forks.continued_rollouts`. `owner` `[S]` int32 is the prompt of
    each, to which `fields` `[P]` belong. The randomness is that of `make_rollout`, of other rows.

    Args:
      policy: the model.
      spec: what to sample; nothing is made on demand.
      mesh: devices; prefixes are sharded over its rows.
    """
    spec = spec._replace(sampler=compiled_part(spec.sampler), required=frozenset(), answer_id=None)
    return _make_growth(policy, spec, mesh)


@functools.lru_cache
def _make_growth(policy: Policy, spec: RolloutSpec, mesh: Mesh) -> Callable[..., Rollouts]:
    @jax.jit
    def growth(
        params: Any, key: Array, index: Array, prefixes: Prefixes, owner: Array, fields: Mapping[str, Array],
        first_row: Array, decode_state: State = (),
    ) -> Rollouts:  # fmt: skip
        fields = jax.tree.map(lambda x: x[owner], fields)
        prefixes, fields = constrain_rows((prefixes, fields), mesh)
        key = jax.random.fold_in(key, index)
        found, _ = continued_rollouts(
            policy, params, prefixes, fields, key, decode_state, spec=spec, first_row=first_row
        )  # fmt: skip
        return constrain_rows(found, mesh)

    return growth


@functools.lru_cache
def make_supervised_step(policy: Policy, optimizer: AdamW, mesh: Mesh) -> Callable[..., tuple[Any, Any, Array]]:
    """The jitted `(params, opt_state, tokens [B, T], weight [B, T]) -> (params, opt_state, loss)`; donates two.

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
        ok = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        params, opt_state = jax.lax.cond(
            ok, lambda: apply_optimizer(optimizer, gradient, opt_state, params), lambda: (params, opt_state)
        )
        shardings = param_shardings(policy, mesh), optimizer_shardings(policy, mesh, optimizer, opt_state)
        return *jax.lax.with_sharding_constraint((params, opt_state), shardings), loss

    return supervised_step

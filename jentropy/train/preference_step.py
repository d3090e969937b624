"""One step of learning from preferences: a batch of pairs becomes a summed gradient and a new state.

A batch of P pairs is a `Rollouts` of 2P rows: a group is a pair, its one reward 1 for the chosen and 0 for the rejected
response. So what surrounds a step - checkpoints, quarantine, metrics - is that of reinforcement learning.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jentropy import outcome, stats
from jentropy.base import ENTROPY, LOG_PROB, Array, Metrics, Policy, Quantities, Rollouts
from jentropy.data.preferences import PairBatch
from jentropy.data.task import Task
from jentropy.preference import Pairs, pair_weight, select_pairs
from jentropy.train.optimizer import AdamW, apply_optimizer, compiled_part, init_optimizer
from jentropy.train.preference_stage import Prefer
from jentropy.train.quarantine import Batch
from jentropy.train.scoring import make_scorer, score_rows, to_micro
from jentropy.train.sharding import constrain_rows, row_sharding
from jentropy.train.state import TrainState, state_shardings
from jentropy.train.step import select_valid


class PreferenceSpec(NamedTuple):
    """Everything about a step that is compiled into it; the numbers of the loss are in `TrainState.mechanism_state`."""

    policy: Policy
    loss: Callable[..., tuple[Array, Metrics]]
    optimizer: AdamW
    num_microbatches: int = 1


def preference_spec(stage: Prefer, policy: Policy) -> PreferenceSpec:
    """What is compiled into the steps of a stage; equal for settings that differ in numbers in the state only."""
    return PreferenceSpec(policy, stage.loss.loss, compiled_part(stage.optimizer), stage.num_microbatches)


def new_preference_stage(params: Any, step: Array, key: Array, stage: Prefer) -> TrainState:
    """The state in which a stage starts; the reference policy is a copy of the parameters."""
    return TrainState(
        step=step,
        params=params,
        opt_state=init_optimizer(stage.optimizer, params),
        mechanism_state=stage.loss.init(),
        estimator_state=(),
        frozen={"reference": jax.tree.map(jnp.copy, params)},
        learners={},
        decode_state=(),
        key=key,
    )


def pair_rollouts(batch: PairBatch) -> Rollouts:
    """The rows of a batch of pairs, on the host."""
    row = np.arange(len(batch.tokens), dtype=np.int32)
    unknown = np.zeros(batch.tokens.shape, np.float32)
    arrays: dict[str, Any] = {
        "tokens": batch.tokens,
        "loss_mask": batch.mask,
        "logp_sampler": unknown,
        "logp_old": unknown,
        "rewards": (1.0 - row % 2).astype(np.float32)[:, None],
        "row_id": row,
        "group": row // 2,
        "parent": np.full_like(row, -1),
        "fork": batch.prompt_length,
    }
    return Rollouts(**arrays, token_data={}, row_data={})


def _entropy_metrics(entropy: Array, rows: Rollouts, is_valid: Array) -> Metrics:
    """What `rollout_metrics` says of the responses of a rollout, of those of the pairs that are valid."""
    used = rows.loss_mask & is_valid[:, None]
    lengths = jnp.sum(used, axis=1, dtype=entropy.dtype)
    per_row = stats.masked_mean(entropy, used, axis=1)
    num_rows = jnp.sum(lengths > 0.0, dtype=entropy.dtype)
    return {
        "actor/entropy": (stats.masked_sum(entropy, used), jnp.sum(lengths)),
        "entropy/sequence_mean": (stats.masked_sum(per_row, lengths > 0.0), num_rows),
        "response_length/mean": (jnp.sum(lengths), num_rows),
    }


def _alternate(chosen: Array, rejected: Array) -> Array:
    """`[2p, ...]`: both rows of a pair side by side, so that rows over devices stay where they are."""
    return jnp.stack([chosen, rejected], axis=1).reshape((-1, *chosen.shape[1:]))


def pair_loss(spec: PreferenceSpec, numbers: Any, params: Any, pairs: Pairs, weight: Array) -> tuple[Array, Metrics]:
    """The loss of some pairs and its metrics: one forward pass over the rows of both sides.

    Args:
      spec: the step.
      numbers: `TrainState.mechanism_state`.
      params: the policy's parameters.
      pairs: p of them.
      weight: `[p]`, see `preference.pair_weight`.
    """
    rows = jax.tree.map(
        lambda a, b: jnp.stack([a, b], axis=1).reshape((-1, *a.shape[1:])), pairs.chosen, pairs.rejected
    )
    scores: Quantities = make_scorer(spec.policy, (LOG_PROB, ENTROPY), 1.0)(params, {}, rows)
    log_prob = scores["log_prob"].reshape((-1, 2, rows.tokens.shape[1]))
    value, metrics = spec.loss(numbers, log_prob[:, 0], log_prob[:, 1], pairs, weight)
    entropy = jax.lax.stop_gradient(scores["entropy"])
    return value, {**metrics, **_entropy_metrics(entropy, rows, jnp.repeat(pairs.valid, 2))}


def _gradient(spec: PreferenceSpec, state: TrainState, pairs: Pairs) -> tuple[Any, Array, Metrics]:
    """(gradient, loss, metrics) of a batch, summed over micro-batches of pairs."""
    weight = pair_weight(pairs)

    def one(part: tuple[Pairs, Array]) -> tuple[Any, Array, Metrics]:
        loss_of = functools.partial(pair_loss, spec, state.mechanism_state)
        (value, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params, *part)
        return gradient, value, metrics

    if spec.num_microbatches == 1:
        return one((pairs, weight))
    micro = to_micro((pairs, weight), spec.num_microbatches)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(lambda carry, part: (jax.tree.map(jnp.add, carry, one(part)), None), zeros, micro)
    return total


def _batch_pairs(spec: PreferenceSpec, state: TrainState, rollouts: Rollouts, mesh: Mesh) -> tuple[Pairs, Metrics]:
    """The pairs of a batch, scored by the reference policy."""
    rows = select_valid(constrain_rows(rollouts, mesh))
    scorer = make_scorer(spec.policy, (LOG_PROB,), 1.0)
    scores = score_rows(scorer, state.frozen["reference"], {}, rows, spec.num_microbatches)
    rows = rows.replace(token_data={**rows.token_data, "ref_log_prob": scores["log_prob"]})
    reward = outcome.total_reward(rows, jnp.ones((), rows.rewards.dtype))
    pairs, found = select_pairs(rows, reward, num_groups=rows.row_id.shape[0] // 2)
    return constrain_rows(pairs, mesh), found


class PreferenceStepper:
    """One batch of pairs and its update; `train_step` is the compiled program of the update.

    Args:
      task: gives the pairs.
      stage: settings.
      policy: the model.
      mesh: devices.
      seed: of the order of the pairs.
    """

    def __init__(self, task: Task, stage: Prefer, policy: Policy, mesh: Mesh, seed: int) -> None:
        self.train_step = make_preference_step(preference_spec(stage, policy), mesh)
        self._source = task.preferences(stage.mixture)
        self._rows, self._seed, self._num_pairs = row_sharding(mesh), seed, stage.batch_size

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, Metrics, Batch]:
        """Advances `state`, which is donated, by the batch number `step`; returns what the step was given, too."""
        pairs = self._source.batch(self._seed, step, self._num_pairs)
        rows = jax.device_put(pair_rollouts(pairs), self._rows)
        return *self.train_step(state, rows), Batch(rows, pairs.example_id)


@functools.lru_cache
def make_preference_step(
    spec: PreferenceSpec, mesh: Mesh
) -> Callable[[TrainState, Rollouts], tuple[TrainState, Metrics]]:
    """The jitted step: `(state, rollouts) -> (state, metrics)`; the state's buffers are donated.

    The update is skipped, and counted, if loss or gradient norm is not finite or no pair is valid.

    Args:
      spec: what to compile.
      mesh: devices; rows, and pairs, are sharded over them.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def preference_step(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        pairs, found = _batch_pairs(spec, state, rollouts, mesh)
        gradient, value, metrics = _gradient(spec, state, pairs)
        norm, one = optax.tree.norm(gradient), jnp.ones((), value.dtype)
        ok = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.any(pairs.valid)
        params, opt_state = jax.lax.cond(
            ok,
            lambda: apply_optimizer(spec.optimizer, gradient, state.opt_state, state.params),
            lambda: (state.params, state.opt_state),
        )
        metrics = {**metrics, "actor/loss": (value, one), "actor/grad_norm": (norm, one)}
        metrics = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), metrics)
        metrics = {**metrics, **found, "update/skipped": ((~ok).astype(value.dtype), one)}
        state = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
        shardings = state_shardings(spec.policy, mesh, spec.optimizer, state)
        return jax.lax.with_sharding_constraint(state, shardings), metrics

    return preference_step

"""One training step: a whole rollout becomes advantages, plans, gradients and a new state.

score -> estimate -> for every update: (score ->) plan -> summed gradients over micro-batches -> optimizer. Nothing
here knows any method by name.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jentropy import compose, outcome, stats
from jentropy.base import (
    ENTROPY,
    LOG_PROB,
    Array,
    Learner,
    Metrics,
    Normaliser,
    Objective,
    Output,
    Plan,
    Policy,
    Quantities,
    Rollouts,
    Signals,
    Surrogate,
    Term,
    initial_plan,
)
from jentropy.samplers import Sampler, Statistics
from jentropy.train.learning import Learners, annotate, compiled_learners, learn
from jentropy.train.ledger import Ledger, Marks, Seen, merge_marks, record, update_marks
from jentropy.train.optimizer import AdamW, apply_optimizer, compiled_part
from jentropy.train.rollout_metrics import rollout_metrics
from jentropy.train.scoring import Scorer, make_scorer, score_rows, to_micro
from jentropy.train.sharding import constrain_rows
from jentropy.train.state import TrainState, state_shardings

UPDATES = 1
"""What of the run's key is folded in for the randomness of updates; see also `programs`."""

Gradient: TypeAlias = tuple[Any, Array, Metrics]
"""(gradient of the parameters, loss scalar, metrics)."""


class StepSpec(NamedTuple):
    """Everything about a step that is compiled into it; equal specs share one compilation.

    Numbers of methods are not here: they are arrays in `TrainState.mechanism_state`.
    """

    policy: Policy
    estimate: Callable[..., Any]
    update: Callable[..., Any]
    outputs: tuple[Output, ...]
    terms: tuple[tuple[str, Term], ...]
    surrogate: Surrogate
    normaliser: Normaliser
    temperature: float
    optimizer: AdamW
    reference: bool = False
    num_minibatches: int = 1
    num_epochs: int = 1
    num_microbatches: int = 1
    advance: Callable[..., Any] | None = None
    left_out: int | None = None
    ledger: Ledger | None = None
    learners: Learners = ()

    @property
    def num_updates(self) -> int:
        """Updates per rollout."""
        return self.num_minibatches * self.num_epochs

    @property
    def scorer(self) -> Scorer:
        """The forward pass of this step."""
        return make_scorer(self.policy, self.outputs, self.temperature)


def make_spec(
    policy: Policy,
    objective: Objective,
    optimizer: AdamW,
    *,
    reference: bool = False,
    num_minibatches: int = 1,
    num_epochs: int = 1,
    num_microbatches: int = 1,
    sampler: Sampler | None = None,
    left_out: int | None = None,
    ledger: Ledger | None = None,
    learners: Mapping[str, Learner] | None = None,
) -> StepSpec:
    """The static description of a step from its parts; a token `left_out` is not in the loss. See `StepSpec`."""
    outputs = tuple(dict.fromkeys((LOG_PROB, ENTROPY, *objective.mechanisms.outputs)))
    return StepSpec(
        policy=policy,
        estimate=objective.estimator.estimate,
        update=objective.mechanisms.update,
        outputs=outputs,
        terms=tuple(sorted(objective.mechanisms.terms.items())),
        surrogate=objective.surrogate,
        normaliser=objective.normaliser,
        temperature=objective.temperature,
        optimizer=compiled_part(optimizer),
        reference=reference,
        num_minibatches=num_minibatches,
        num_epochs=num_epochs,
        num_microbatches=num_microbatches,
        advance=None if sampler is None else sampler.advance,
        left_out=left_out,
        ledger=ledger,
        learners=compiled_learners(learners or {}),
    )


def _without(token: int | None, rows: Rollouts) -> Rollouts:
    """The rows without `token` in the loss mask."""
    return rows if token is None else rows.replace(loss_mask=rows.loss_mask & (rows.tokens != token))


def select_valid(rows: Rollouts) -> Rollouts:
    """The rows with every per-token number outside the loss mask set to 0: garbage there has no influence."""

    def valid(x: Array) -> Array:
        return jnp.where(rows.loss_mask, x, jnp.zeros((), x.dtype))

    return rows.replace(
        logp_sampler=valid(rows.logp_sampler),
        logp_old=valid(rows.logp_old),
        token_data={k: v if k == "temperature" else valid(v) for k, v in rows.token_data.items()},
    )


def plan_update(spec: StepSpec, state: Any, signals: Signals, advantage: Array, key: Array) -> tuple[Plan, Array, Any]:
    """Runs the chain and the normaliser on one update batch.

    Args:
      spec: the step.
      state: mechanism state.
      signals: the update batch and its scores.
      advantage: `[B, T]`.
      key: consumed.

    Returns:
      The plan; the weight `[B, T]` of each token's surrogate; the new mechanism state.
    """
    return _plan(spec, state, signals, advantage, key)[:3]


def _plan(spec: StepSpec, state: Any, signals: Signals, advantage: Array, key: Array) -> tuple[Plan, Array, Any, Marks]:
    """`plan_update`, and for the ledger which tokens each part of the chain touched."""
    plan, touched = initial_plan(signals.batch, advantage), {}
    if spec.ledger is None:
        plan, state = spec.update(plan, state, signals, key)
    else:
        plan, state, touched = compose.walk(spec.update, plan, state, signals, key)
    normaliser = spec.normaliser(plan.counted, signals.batch)
    weight = jnp.where(signals.batch.loss_mask, plan.pg_weight * normaliser, 0.0)
    return plan, weight, state, touched


def loss(
    spec: StepSpec, q: Quantities, plan: Plan, weight: Array, rows: Rollouts, first: Array
) -> tuple[Array, Metrics]:
    """The loss of some rows: a sum over their tokens of `q` alone.

    Args:
      spec: the step.
      q: `{output name: [b, T]}`, differentiable.
      plan: these rows of the plan.
      weight: `[b, T]`, from `plan_update`.
      rows: these rows of the batch.
      first: bool scalar: the parameters are still those of the rollout. Then the ratio's denominator is the current
        score, so the ratio is exactly 1.

    Returns:
      The loss, nats or reward units summed; metrics as `(sum, count)`, without per-update ones.
    """
    old = jnp.where(first, jax.lax.stop_gradient(q["log_prob"]), rows.logp_old)
    rows = rows.replace(logp_old=old)
    per_token, metrics = spec.surrogate(q, plan, rows)
    parts = {"pg": jnp.sum(weight * jnp.where(rows.loss_mask, per_token, 0.0))}
    for name, term in spec.terms:
        if name in plan.terms:
            value = jnp.where(rows.loss_mask, term(q, plan, rows), 0.0)
            parts[name] = jnp.sum(jnp.where(rows.loss_mask, plan.terms[name], 0.0) * value)
    total = sum(parts.values(), jnp.zeros((), per_token.dtype))
    losses = {f"actor/{name}_loss": (value, jnp.zeros_like(value)) for name, value in parts.items()}
    return total, {**metrics, **losses}


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


Pullback: TypeAlias = Callable[[Callable[..., Any], Any], Gradient]


def forward(
    spec: StepSpec, params: Any, frozen: Mapping[str, Any], rows: Rollouts
) -> tuple[dict[str, Array], Pullback]:
    """Scores the rows of an update, and returns how to get the gradient of a loss of those scores.

    With one micro-batch plan and gradient share one forward pass; with several, all rows are scored first and the
    gradient is summed over a second pass.
    """
    scorer, num = spec.scorer, spec.num_microbatches
    if num == 1:
        q, vjp = jax.vjp(lambda p: scorer(p, frozen, rows), params)

        def pull(loss_of: Callable[..., Any], parts: Any) -> Gradient:
            (value, metrics), cotangent = jax.value_and_grad(loss_of, has_aux=True)(q, parts)
            return vjp(cotangent)[0], value, metrics

        return jax.lax.stop_gradient(q), pull

    def pull_micro(loss_of: Callable[..., Any], parts: Any) -> Gradient:
        def of_params(p: Any, part: Any, part_rows: Rollouts) -> Any:
            return loss_of(scorer(p, frozen, part_rows), part)

        def one(xs: Any) -> Gradient:
            (value, metrics), gradient = jax.value_and_grad(of_params, has_aux=True)(params, *xs)
            return gradient, value, metrics

        micro = to_micro((parts, rows), num)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(lambda carry, xs: (_add(carry, one(xs)), None), zeros, micro)
        return total

    return score_rows(scorer, params, frozen, rows, num), pull_micro


class _Carry(NamedTuple):
    params: Any
    opt_state: Any
    mechanism_state: Any


Prepare: TypeAlias = Callable[[Rollouts, Quantities], tuple[Rollouts, Array, Any]]
"""(rows, scores) -> (rows, advantage `[B, T]`, anything else it found)."""


def _update(
    spec: StepSpec, state: TrainState, carry: _Carry, rows: Rollouts, index: Array, key: Array, prepare: Prepare
) -> tuple[_Carry, Metrics, Any, Marks]:
    """One optimizer update; skipped, and counted, if loss or gradient norm is not finite or no token is valid.

    One whose rows are all padding, without a valid row, is skipped and not counted: nothing is wrong with it.
    """
    scores, pull = forward(spec, carry.params, state.frozen, rows)
    first = index == 0
    rows = rows.replace(logp_old=jnp.where(first, scores["log_prob"], rows.logp_old))
    rows, advantage, found = prepare(rows, scores)
    signals = Signals(batch=rows, scores=scores, step=state.step, update_index=index)
    plan, weight, mechanism_state, marks = _plan(spec, carry.mechanism_state, signals, advantage, key)

    def loss_of(q: Quantities, parts: tuple[Plan, Array, Rollouts]) -> tuple[Array, Metrics]:
        part_plan, part_weight, part_rows = parts
        return loss(spec, q, part_plan, part_weight, part_rows, first)

    gradient, value, metrics = pull(loss_of, (plan.replace(metrics={}), weight, rows))
    norm = optax.tree.norm(gradient)
    ok = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.any(rows.loss_mask)
    params, opt_state = jax.lax.cond(
        ok,
        lambda: apply_optimizer(spec.optimizer, gradient, carry.opt_state, carry.params),
        lambda: (carry.params, carry.opt_state),
    )
    mechanism_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), mechanism_state, carry.mechanism_state)
    if spec.ledger is not None:
        marks = update_marks(spec.surrogate, scores, plan.replace(metrics={}), rows, marks, ok)
    one = jnp.ones((), value.dtype)
    metrics = {k: (s, one) if k.endswith("_loss") else (s, n) for k, (s, n) in metrics.items()}
    metrics |= {**plan.metrics, "actor/loss": (value, one), "actor/grad_norm": (norm, one)}
    metrics = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), metrics)
    is_padding = ~jnp.any(rows.loss_mask) & ~jnp.any(outcome.valid_rows(rows))
    metrics["update/skipped"] = ((~ok & ~is_padding).astype(value.dtype), one)
    return _Carry(params, opt_state, mechanism_state), metrics, found, marks


def _minibatch_rows(group: Array, num_minibatches: int, num_epochs: int, num_groups: int, key: Array) -> Array:
    """`[updates, rows]` int32 row indices: every epoch cuts all groups, whole and in a new order, into minibatches."""
    by_group = jnp.argsort(group, stable=True).reshape((num_groups, -1))

    def epoch(epoch_key: Array) -> Array:
        return by_group[jax.random.permutation(epoch_key, num_groups)].reshape((num_minibatches, -1))

    return jax.vmap(epoch)(jax.random.split(key, num_epochs)).reshape((num_minibatches * num_epochs, -1))


def _advanced(spec: StepSpec, state: TrainState, rows: Rollouts, scores: Quantities) -> Any:
    """The sampler's state for the next rollout; as it was if this one has no token or an entropy that is not finite."""
    if spec.advance is None:
        return state.decode_state
    entropy = stats.masked_mean(scores["entropy"], rows.loss_mask)
    new = spec.advance(state.decode_state, Statistics(entropy, jnp.asarray(spec.temperature, entropy.dtype)))
    ok = jnp.isfinite(entropy) & jnp.any(rows.loss_mask)
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state.decode_state)


def _estimate(spec: StepSpec, state: TrainState, rows: Rollouts, scores: Quantities) -> tuple[Rollouts, Array, Any]:
    rows, learned, metrics = annotate(spec.learners, state, rows)
    advantage, token_data, found, estimator_state = spec.estimate(rows, state.estimator_state)
    rows = rows.replace(token_data={**rows.token_data, **token_data})
    learned, reported = learn(spec.learners, state, learned, rows, first=False)
    metrics = {**metrics, **reported, **found, **rollout_metrics(rows, scores, advantage)}
    decode_state = _advanced(spec, state, rows, scores)
    carried = {"estimator_state": estimator_state, "decode_state": decode_state, "learners": learned}
    return rows, advantage, (carried, metrics, Seen(rows, advantage, {}))


def _single(spec: StepSpec, state: TrainState, rows: Rollouts, key: Array) -> tuple[_Carry, Metrics, Any, Seen]:
    """One update on the whole rollout: its own forward pass is the old-log-probability pass."""
    carry = _Carry(state.params, state.opt_state, state.mechanism_state)
    prepare = functools.partial(_estimate, spec, state)
    carry, metrics, (carried, found, seen), marks = _update(spec, state, carry, rows, jnp.int32(0), key, prepare)
    return carry, {**metrics, **found}, carried, seen._replace(marks=marks)


def _several(
    spec: StepSpec, state: TrainState, rows: Rollouts, key: Array, num_groups: int, mesh: Mesh
) -> tuple[_Carry, Metrics, Any, Seen]:
    """Several updates: the rollout is scored and estimated once, then cut into minibatches of whole groups."""
    scores = score_rows(spec.scorer, state.params, state.frozen, rows, spec.num_microbatches)
    rows, advantage, (carried, found, seen) = _estimate(spec, state, rows.replace(logp_old=scores["log_prob"]), scores)
    cut_key, plan_key = jax.random.split(key)
    indices = _minibatch_rows(rows.group, spec.num_minibatches, spec.num_epochs, num_groups, cut_key)

    def body(carry: _Carry, xs: tuple[Array, Array]) -> tuple[_Carry, tuple[Metrics, Marks]]:
        index, chosen = xs
        part, part_advantage = constrain_rows(jax.tree.map(lambda x: x[chosen], (rows, advantage)), mesh)
        part = part.replace(group=jnp.arange(chosen.shape[0], dtype=jnp.int32) // (rows.group.shape[0] // num_groups))
        update_key = jax.random.fold_in(plan_key, index)
        keys = index, update_key
        carry, metrics, _, marks = _update(spec, state, carry, part, *keys, lambda r, _: (r, part_advantage, None))
        return carry, (metrics, marks)

    start = _Carry(state.params, state.opt_state, state.mechanism_state)
    carry, (metrics, marks) = jax.lax.scan(body, start, (jnp.arange(spec.num_updates, dtype=jnp.int32), indices))
    seen = seen._replace(marks=merge_marks(marks, indices, rows.row_id.shape[0]))
    return carry, {**jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics), **found}, carried, seen


def _with_reference(spec: StepSpec, state: TrainState, rows: Rollouts) -> Rollouts:
    if not spec.reference:
        return rows
    scorer = make_scorer(spec.policy, (LOG_PROB,), spec.temperature)
    scores = score_rows(scorer, state.frozen["reference"], {}, rows, spec.num_microbatches)
    return rows.replace(token_data={**rows.token_data, "ref_log_prob": scores["log_prob"]})


def step_rows(spec: StepSpec, state: TrainState, rollouts: Rollouts, mesh: Mesh) -> Rollouts:
    """The rows of a rollout as the updates of a step see them, scored by the reference policy if there is one."""
    return _with_reference(spec, state, select_valid(_without(spec.left_out, constrain_rows(rollouts, mesh))))


def step_key(state: TrainState) -> Array:
    """The key of a step's updates."""
    return jax.random.fold_in(jax.random.fold_in(state.key, UPDATES), state.step)


@functools.lru_cache
def make_train_step(
    spec: StepSpec, num_groups: int, mesh: Mesh
) -> Callable[[TrainState, Rollouts], tuple[TrainState, Metrics]]:
    """The jitted step: `(state, rollouts) -> (state, metrics)`; the state's buffers are donated.

    Args:
      spec: what to compile.
      num_groups: groups in a rollout; each has the same number of rows.
      mesh: devices; rows of the rollout are sharded over them.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        rows, key = step_rows(spec, state, rollouts, mesh), step_key(state)
        if spec.num_updates == 1:
            carry, metrics, carried, seen = _single(spec, state, rows, key)
        else:
            carry, metrics, carried, seen = _several(spec, state, rows, key, num_groups, mesh)
        if spec.ledger is not None:
            sweep = spec.policy, spec.temperature, spec.num_microbatches
            entry = record(spec.ledger, *sweep, state.params, carry.params, state.step, constrain_rows(seen, mesh))
            metrics = {**metrics, **entry}
        state = state.replace(**carry._asdict(), **carried, step=state.step + 1)
        shardings = state_shardings(spec.policy, mesh, spec.optimizer, state)
        return jax.lax.with_sharding_constraint(state, shardings), metrics

    return train_step

"""Small batches for the tests of methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jentropy.base import Estimator, Mechanism, Plan, Rollouts, Signals, Surrogate, initial_plan


def rollouts(loss_mask, *, logp_old=None, rewards=None, group=None, row_id=None, token_data=None, row_data=None):
    """Rows with a loss mask `[B, T]`; what is not given is 0, or one group of all rows."""
    mask = jnp.asarray(loss_mask, bool)
    num_rows, zeros = mask.shape[0], jnp.zeros(mask.shape)
    rewards = jnp.zeros((num_rows, 1)) if rewards is None else jnp.asarray(rewards)
    return Rollouts(
        tokens=jnp.zeros(mask.shape, jnp.int32),
        loss_mask=mask,
        logp_sampler=zeros,
        logp_old=zeros if logp_old is None else jnp.asarray(logp_old),
        rewards=rewards if rewards.ndim == 2 else rewards[:, None],
        row_id=jnp.arange(num_rows, dtype=jnp.int32) if row_id is None else jnp.asarray(row_id, jnp.int32),
        group=jnp.zeros(num_rows, jnp.int32) if group is None else jnp.asarray(group, jnp.int32),
        parent=jnp.full(num_rows, -1, jnp.int32),
        fork=jnp.zeros(num_rows, jnp.int32),
        token_data={k: jnp.asarray(v) for k, v in (token_data or {}).items()},
        row_data={k: jnp.asarray(v) for k, v in (row_data or {}).items()},
    )


def signals(batch: Rollouts, **scores) -> Signals:
    """The batch with its scores `[B, T]` by name."""
    scores = {k: jnp.asarray(v) for k, v in scores.items()}
    return Signals(batch=batch, scores=scores, step=jnp.int32(0), update_index=jnp.int32(0))


def random_batch(seed: int = 0, shape: tuple[int, int] = (6, 10), fill: float = 0.0):
    """A batch with ragged rows, its signals and an advantage `[B, T]`; outside the mask everything is `fill`."""
    rng = np.random.default_rng(seed)
    mask = np.arange(shape[1])[None, :] < rng.integers(2, shape[1], shape[0])[:, None]
    log_prob, old, ref, advantage = (
        jnp.asarray(np.where(mask, x, fill), jnp.float32)
        for x in (
            -rng.exponential(size=shape),
            -rng.exponential(size=shape),
            -rng.exponential(size=shape),
            rng.normal(size=shape),
        )
    )
    entropy = jnp.asarray(np.where(mask, rng.exponential(size=shape), fill), jnp.float32)
    batch = rollouts(mask, logp_old=old, token_data={"ref_log_prob": ref})
    return batch, signals(batch, log_prob=log_prob, entropy=entropy), advantage


@functools.cache
def _jitted(function):
    """Equal functions share one compilation even when the first of them is no longer alive."""
    return jax.jit(function)


def update(mechanism: Mechanism, signals_: Signals, advantage, key=0, plan: Plan | None = None) -> Plan:
    """The plan that a mechanism makes of an initial one, jitted; its metrics are NumPy numbers."""
    plan = initial_plan(signals_.batch, advantage) if plan is None else plan
    plan, _ = _jitted(mechanism.update)(plan, mechanism.init(), signals_, jax.random.key(key))
    return plan.replace(metrics=jax.tree.map(np.asarray, plan.metrics))


def estimate(estimator: Estimator, batch: Rollouts):
    """`(advantage [B, T], metrics)` of an estimator, jitted."""
    advantage, _, metrics, _ = _jitted(estimator.estimate)(batch, estimator.init())
    return jax.tree.map(np.asarray, (advantage, metrics))


@functools.partial(jax.jit, static_argnames=("surrogate", "terms"))
def _value_and_grad(scores, plan, weight, batch, *, surrogate, terms):
    def loss(log_prob):
        quantities = {**scores, "log_prob": log_prob}
        token_loss, metrics = surrogate(quantities, plan, batch)
        total = jnp.sum(weight * token_loss)
        for name, coefficient in plan.terms.items():
            total += jnp.sum(coefficient * dict(terms)[name](quantities, plan, batch))
        return total, metrics

    return jax.value_and_grad(loss, has_aux=True)(scores["log_prob"])


def loss_and_gradient(plan: Plan, signals_: Signals, *, surrogate: Surrogate, normaliser, terms=None):
    """Of `Σ w · surrogate + Σ c · term`: `(loss, d loss / d log_prob [B, T], surrogate's metrics)`, NumPy numbers."""
    (value, metrics), gradient = _value_and_grad(
        signals_.scores,
        plan.replace(metrics={}),
        plan.pg_weight * normaliser(plan.counted, signals_.batch),
        signals_.batch,
        surrogate=surrogate,
        terms=tuple(sorted((terms or {}).items())),
    )
    return jax.tree.map(np.asarray, (value, gradient, metrics))

"""The training step: against plain formulas, in micro-batches, at the first update, with bad numbers, in memory."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jentropy import features
from jentropy.advantages.grpo import grpo
from jentropy.base import Array, Mechanism, Objective, Rollouts, hyper
from jentropy.compose import chain
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.kl_cov import kl_cov
from jentropy.mechanisms.kl_reference import kl_reference
from jentropy.normalisers import token_mean
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.surrogates import ratio
from jentropy.train.optimizer import AdamW
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.state import new_stage
from jentropy.train.step import _minibatch_rows, make_spec, make_train_step

GROUPS, GENERATIONS, COLUMNS, VOCAB = 4, 4, 9, 16
ROWS = GROUPS * GENERATIONS
TEMPERATURE = 0.8
OPTIMIZER = AdamW(learning_rate=3e-3, weight_decay=0.1)
POLICY = transformer(
    TransformerConfig(
        vocab_size=VOCAB, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_size=8, mlp_width=24
    )
)  # fmt: skip


class PoisonState(NamedTuple):
    index: Array
    value: Array
    calls: Array


def _poison(plan, state, signals, key):
    """Puts `value` in the advantage of one token at update `index`."""
    here = (signals.update_index == state.index) & signals.batch.loss_mask & (signals.batch.row_id == 5)[:, None]
    plan = plan.replace(advantage=jnp.where(here, state.value, plan.advantage))
    return plan, state._replace(calls=state.calls + 1)


def poison(index: int = -1, value: float = np.nan) -> Mechanism:
    return Mechanism(lambda: PoisonState(jnp.int32(index), hyper(value), jnp.int32(0)), _poison)


def objective(*, penalty: float = 0.0, bad: Mechanism | None = None, surrogate=ratio) -> Objective:
    """One chain for all tests, in which only numbers change: GRPO, an entropy bonus, KL-Cov (off), no poison."""
    mechanisms = chain(
        poison=poison() if bad is None else bad,
        clip_range=clip_range(epsilon_low=0.02),
        kl_cov=kl_cov(kl_cov_ratio=0.3, ppo_kl_coef=penalty, keep_clip=True),
        entropy_bonus=entropy_bonus(entropy_coef=0.05),
    )
    return Objective(grpo(), mechanisms, surrogate, token_mean, TEMPERATURE)


@functools.cache
def rollouts(seed: int = 0) -> Rollouts:
    """Random tokens with responses of 1 to 6 tokens; `logp_old` and what is outside the mask is garbage."""
    rng = np.random.default_rng(seed)
    column, start = np.arange(COLUMNS)[None, :], rng.integers(1, 4, ROWS)[:, None]
    mask = (column >= start) & (column < start + rng.integers(1, 7, ROWS)[:, None])
    garbage = np.where(mask, -1.0, np.nan).astype(np.float32)
    return Rollouts(
        tokens=jnp.asarray(rng.integers(0, VOCAB, mask.shape), jnp.int32),
        loss_mask=jnp.asarray(mask),
        logp_sampler=jnp.asarray(garbage),
        logp_old=jnp.asarray(garbage),
        rewards=jnp.asarray(rng.normal(size=(ROWS, 1)), jnp.float32),
        row_id=jnp.arange(ROWS, dtype=jnp.int32),
        group=jnp.asarray(np.repeat(rng.permutation(GROUPS), GENERATIONS), jnp.int32),
        parent=jnp.full(ROWS, -1, jnp.int32),
        fork=jnp.zeros(ROWS, jnp.int32),
    )


@functools.cache
def params():
    return jax.jit(POLICY.init)(jax.random.key(0))


def new_state(method: Objective, reference: bool = False):
    return new_stage(
        jax.tree.map(jnp.copy, params()), jnp.int32(0), jax.random.key(1), method, OPTIMIZER, reference
    )  # fmt: skip


def step_of(method: Objective, **cuts):
    """The compiled step; equal for methods that differ in numbers only."""
    spec = make_spec(POLICY, method, OPTIMIZER, **cuts)
    return make_train_step(spec, GROUPS, make_mesh(MeshShape(), 1))


def run(method: Objective, *batches: Rollouts, **cuts):
    """The state after a step on each of the batches, and the metrics of the last."""
    state, step, metrics = new_state(method), step_of(method, **cuts), {}
    for batch in batches:
        state, metrics = step(state, batch)
    return jax.tree.map(np.asarray, (state.replace(key=0), metrics))


def _trained(state):
    return state.params, state.opt_state, state.mechanism_state


def _num_adam_updates(state) -> int:
    return int(optax.tree_utils.tree_get(state.opt_state, "ScaleByAdamState").count)


# Against a loop in plain jnp.


def _plain_scores(parameters, tokens):
    logits = jnp.einsum("btd,vd->btv", POLICY.hidden(parameters, tokens)[:, :-1], POLICY.unembed(parameters))
    log_prob = features.log_prob(logits, tokens[:, 1:], temperature=TEMPERATURE)
    return log_prob, features.entropy(logits, temperature=TEMPERATURE)


def _plain_loss(parameters, batch: Rollouts, old: Array) -> Array:
    """GRPO on the whole batch with an entropy bonus, written from the formulas on full logits."""
    reward = batch.rewards[:, 0]
    same = (batch.group[:, None] == batch.group[None, :]).astype(jnp.float32)
    centred = reward - same @ reward / GENERATIONS
    std = jnp.sqrt(same @ centred**2 / (GENERATIONS - 1))
    advantage = (centred / (std + 1e-6))[:, None]
    log_prob, entropy = _plain_scores(parameters, batch.tokens)
    r = jnp.exp(log_prob - old)
    clipped = jnp.minimum(r * advantage, jnp.clip(r, 0.98, 1.02) * advantage)
    return jnp.mean(-clipped - 0.05 * entropy, where=batch.loss_mask[:, 1:])


@functools.cache
def plain(num_updates: int):
    """Parameters and losses of some updates on the whole batch, by optax's own AdamW."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.clip_norm),
        optax.adamw(
            OPTIMIZER.learning_rate, b1=OPTIMIZER.b1, b2=OPTIMIZER.b2, eps=OPTIMIZER.epsilon,
            weight_decay=OPTIMIZER.weight_decay,
        ),
    )  # fmt: skip

    @jax.jit
    def update(parameters, opt_state, old):
        value, gradient = jax.value_and_grad(_plain_loss)(parameters, rollouts(), old)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, opt_state, parameters)
            return optax.apply_updates(parameters, updates), opt_state, value

    parameters, opt_state, losses = params(), optimizer.init(params()), []
    old = jax.jit(_plain_scores)(parameters, rollouts().tokens)[0]
    for _ in range(num_updates):
        parameters, opt_state, value = update(parameters, opt_state, old)
        losses.append(float(value))
    return jax.tree.map(np.asarray, parameters), losses


@pytest.mark.parametrize("num_updates", [1, 3])
def test_step_is_the_plain_loop(num_updates):
    state, metrics = run(objective(), rollouts(), num_epochs=num_updates)
    wanted, losses = plain(num_updates)
    chex.assert_trees_all_close(state.params, wanted, rtol=2e-5, atol=1e-6)
    total, count = metrics["actor/loss"]
    np.testing.assert_allclose(total, np.sum(losses), rtol=1e-4, atol=1e-6)
    assert count == num_updates and metrics["update/skipped"] == (0.0, num_updates)
    assert state.step == 1 and _num_adam_updates(state) == num_updates
    assert state.mechanism_state["poison"].calls == num_updates


# Cuts.


@pytest.mark.parametrize("num, cuts", [(2, {}), (4, {"num_minibatches": 2, "num_epochs": 2})])
def test_micro_batches_change_nothing(num, cuts):
    wanted, wanted_metrics = run(objective(penalty=0.1), rollouts(), **cuts)
    found, metrics = run(objective(penalty=0.1), rollouts(), num_microbatches=num, **cuts)
    chex.assert_trees_all_close(found.params, wanted.params, rtol=2e-5, atol=1e-6)
    assert set(metrics) == set(wanted_metrics)
    for name, (total, count) in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name][0], total, rtol=2e-4, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(metrics[name][1], count, err_msg=name)


def test_minibatches_are_whole_groups_and_epochs_are_complete():
    group = jnp.asarray(np.random.default_rng(0).permutation(np.repeat(np.arange(6), 3)), jnp.int32)
    rows = np.asarray(_minibatch_rows(group, 3, 2, 6, jax.random.key(0)))
    assert rows.shape == (6, 6)
    groups = np.asarray(group)[rows]
    for minibatch in groups.reshape(6, 2, 3):
        assert np.all(minibatch == minibatch[:, :1])
    for epoch in rows.reshape(2, -1):
        assert sorted(epoch) == list(range(18))
    assert not np.array_equal(rows[:3], rows[3:])


# The first update of a rollout.


@pytest.mark.parametrize("num", [1, 2])
def test_at_the_first_update_the_ratio_is_one_and_kl_cov_has_no_gradient(num):
    without, _ = run(objective(penalty=0.0), rollouts(), num_microbatches=num)
    found, metrics = run(objective(penalty=10.0), rollouts(), num_microbatches=num)
    chex.assert_trees_all_equal((found.params, found.opt_state), (without.params, without.opt_state))
    assert metrics["kl_cov/selected_fraction"][0] > 0
    for name in ("actor/ppo_kl", "actor/pg_clipfrac", "kl_cov/selected_abs_log_ratio", "actor/abs_log_ratio_loss"):
        assert metrics[name][0] == 0.0, name


def test_at_later_updates_kl_cov_has_a_gradient():
    without, _ = run(objective(penalty=0.0), rollouts(), num_epochs=3)
    found, metrics = run(objective(penalty=10.0), rollouts(), num_epochs=3)
    assert metrics["actor/ppo_kl"][0] != 0.0 and metrics["kl_cov/selected_abs_log_ratio"][0] > 0.0
    moved = [np.max(np.abs(x - y)) for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(without.params))]
    assert max(moved) > 1e-4


def test_given_old_log_probabilities_have_no_influence():
    """The denominator of the ratio is the trainer's own score at the start of the updates."""
    other = rollouts().replace(logp_old=rollouts().logp_old * 3.0)
    for cuts in ({}, {"num_epochs": 3}):
        chex.assert_trees_all_equal(
            _trained(run(objective(), other, **cuts)[0]), _trained(run(objective(), rollouts(), **cuts)[0])
        )


# Bad numbers.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_bad_update_is_skipped(value):
    """1e30 leaves loss and gradient finite, but not the norm by which the gradient would be clipped: to zero."""
    before = new_state(objective())
    state, metrics = run(objective(bad=poison(0, value)), rollouts())
    chex.assert_trees_all_equal((state.params, state.opt_state), (before.params, before.opt_state))
    assert state.mechanism_state["poison"].calls == 0
    assert metrics["update/skipped"] == (1.0, 1.0) and state.step == 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(metrics))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_the_bad_update_is_skipped(index):
    """Of three epochs over one batch one is bad: what is left is two updates, with the moments of two."""
    state, metrics = run(objective(bad=poison(index, np.nan)), rollouts(), num_epochs=3)
    chex.assert_trees_all_close(state.params, plain(2)[0], rtol=2e-5, atol=1e-6)
    assert metrics["update/skipped"] == (1.0, 3.0) and metrics["actor/loss"][1] == 2.0
    assert _num_adam_updates(state) == 2 and state.mechanism_state["poison"].calls == 2 and state.step == 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(metrics))


def _infinite_slope(quantities, plan, batch):
    """A finite loss with an infinite gradient where the first group has its tokens."""
    loss, metrics = ratio(quantities, plan, batch)
    zero = quantities["log_prob"] - jax.lax.stop_gradient(quantities["log_prob"])
    return loss + jnp.where((batch.row_id < 2)[:, None], jnp.sqrt(zero), 0.0), metrics


def test_a_bad_gradient_of_a_finite_loss_is_skipped():
    method = objective(surrogate=_infinite_slope)
    before = new_state(method)
    state, metrics = run(method, rollouts())
    chex.assert_trees_all_equal(_trained(state), jax.tree.map(np.asarray, _trained(before)))
    assert metrics["update/skipped"] == (1.0, 1.0) and state.step == 1


def test_without_a_valid_token_the_update_is_skipped():
    """Momentum and weight decay must not move the parameters."""
    empty = rollouts().replace(loss_mask=jnp.zeros_like(rollouts().loss_mask))
    once, _ = run(objective(), rollouts())
    state, metrics = run(objective(), rollouts(), empty)
    chex.assert_trees_all_equal(_trained(state), _trained(once))
    assert metrics["update/skipped"] == (1.0, 1.0) and state.step == 2
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(metrics))


def test_only_an_empty_minibatch_is_skipped():
    batch = rollouts()
    half = batch.replace(loss_mask=batch.loss_mask & (batch.group == 1)[:, None])
    state, metrics = run(objective(), half, num_minibatches=2, num_epochs=2)
    assert metrics["update/skipped"] == (2.0, 4.0) and _num_adam_updates(state) == 2


# Memory.


def test_no_array_over_the_vocabulary():
    """At V = 49152 logits of all tokens would take 403 MB; with the reference's divergence they would exist twice."""
    vocab, rows, columns = 49152, 32, 64
    config = TransformerConfig(
        vocab_size=vocab, width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, mlp_width=8
    )  # fmt: skip
    policy = transformer(config)
    mechanisms = chain(
        kl_cov=kl_cov(), bonus=entropy_bonus(entropy_coef=0.1), reference=kl_reference(estimator="full")
    )  # fmt: skip
    method = Objective(grpo(), mechanisms, ratio, token_mean)
    spec = make_spec(policy, method, OPTIMIZER, reference=True, num_epochs=2)

    def shapes():
        parameters = policy.init(jax.random.key(0))
        return new_stage(parameters, jnp.int32(0), jax.random.key(1), method, OPTIMIZER, True)

    def widen(x):
        return jax.ShapeDtypeStruct((rows, *(columns if n == COLUMNS else n for n in x.shape[1:])), x.dtype)

    step = make_train_step(spec, 8, make_mesh(MeshShape(), 1))
    memory = step.lower(jax.eval_shape(shapes), jax.tree.map(widen, rollouts())).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * columns * vocab * 4 / 4

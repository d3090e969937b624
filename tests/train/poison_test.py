"""Numbers that are not finite, in one update of a real step: it is lost, and nothing else is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from poison import _poisoned as poisoned
from poison import poison

from jentropy.advantages.grpo import grpo
from jentropy.base import Objective, Rollouts
from jentropy.compose import chain
from jentropy.mechanisms.clip_range import clip_range
from jentropy.normalisers import token_mean
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.surrogates import ratio
from jentropy.train.optimizer import AdamW
from jentropy.train.quarantine import SKIPPED
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.state import new_stage
from jentropy.train.step import make_spec, make_train_step

GROUPS, GENERATIONS, COLUMNS = 4, 2, 6
POLICY = transformer(
    TransformerConfig(vocab_size=8, width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, mlp_width=8)
)
OPTIMIZER = AdamW(learning_rate=1e-2, weight_decay=0.1)
PLACES = [("gradient", "nan"), ("gradient", "inf"), ("gradient", "-inf"), ("loss", "nan"), ("loss", "inf")]


def rows() -> Rollouts:
    rng, num = np.random.default_rng(0), GROUPS * GENERATIONS
    tokens, row_id = rng.integers(0, 8, (num, COLUMNS)), jnp.arange(num, dtype=jnp.int32)
    zeros = jnp.zeros((num, COLUMNS))
    return Rollouts(
        tokens=jnp.asarray(tokens, jnp.int32), loss_mask=jnp.asarray(np.arange(COLUMNS)[None, :] >= [[2]] * num),
        logp_sampler=zeros, logp_old=zeros, rewards=jnp.asarray(rng.integers(0, 2, (num, 1)), jnp.float32),
        row_id=row_id, group=row_id // GENERATIONS, parent=jnp.full_like(row_id, -1), fork=jnp.full_like(row_id, 2),
    )  # fmt: skip


def run(num_steps: int = 1, **settings):
    """States after every step, and the share of skipped updates in each; all calls run one program."""
    objective = Objective(grpo(), chain(clip=clip_range(), poison=poison(**settings)), ratio, token_mean)
    spec = make_spec(POLICY, objective, OPTIMIZER, num_minibatches=2, num_epochs=2)
    step = make_train_step(spec, GROUPS, make_mesh(MeshShape(), 1))
    state = new_stage(POLICY.init(jax.random.key(1)), jnp.int32(0), jax.random.key(0), objective, OPTIMIZER, False)
    states, skipped = [], []
    for _ in range(num_steps):
        state, metrics = step(state, rows())
        states.append(jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key))))
        total, count = metrics[SKIPPED]
        skipped.append(float(total) / float(count))
    return states, skipped


@functools.cache
def healthy():
    return run(2)


def equal(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize(("where", "value"), PLACES)
def test_it_strikes_the_loss_or_the_gradient(where, value):
    number = float(value)
    places = (number, 0.0) if where == "loss" else (0.0, number)
    found = jax.value_and_grad(poisoned)(jnp.float32(-1.0), *(jnp.float32(place) for place in places))
    np.testing.assert_array_equal(found, places)


def test_without_a_strike_nothing_is_skipped():
    states, skipped = healthy()
    assert skipped == [0.0, 0.0] and not equal(states[0].params, states[1].params)


@pytest.mark.parametrize(("where", "value"), PLACES)
def test_a_struck_rollout_moves_nothing_and_the_next_one_does(where, value):
    states, skipped = run(3, step=1, where=where, value=value)
    assert skipped == [0.0, 1.0, 0.0]
    first = healthy()[0][0]
    for name in ("params", "opt_state"):
        assert equal(getattr(states[0], name), getattr(first, name))
        assert equal(getattr(states[1], name), getattr(states[0], name))
        assert not equal(getattr(states[2], name), getattr(states[1], name))
    assert [int(state.step) for state in states] == [1, 2, 3]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[2].params))


@pytest.mark.parametrize(("settings", "lost"), [({"update_index": 2}, 0.25), ({"row": 5}, 0.5)])
def test_only_the_struck_updates_are_lost(settings, lost):
    states, skipped = run(1, step=0, **settings)
    assert skipped == [lost]
    updates = [leaf for leaf in jax.tree.leaves(states[0].opt_state) if leaf.dtype == np.int32]
    assert updates and all(count == 4 * (1 - lost) for count in updates)


@pytest.mark.parametrize(("name", "value"), [("where", "advantage"), ("value", "1.0")])
def test_settings_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got '{value}'"):
        poison(**{name: value})

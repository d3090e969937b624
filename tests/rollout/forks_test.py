"""Rows that go on from a prefix: the same tokens and scores as rows sampled whole, within the same columns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jentropy import features
from jentropy.policy import TransformerConfig, transformer
from jentropy.rewards.base import DeviceReward
from jentropy.rollout.forks import Prefixes, continued_rollouts, cut, response_columns
from jentropy.rollout.iid import RolloutSpec, iid_rollouts

CONFIG = TransformerConfig(
    vocab_size=9, width=16, num_layers=1, num_heads=4, num_kv_heads=2, head_size=4, mlp_width=24, rope_theta=100.0
)
PAD, EOS, NEW = 7, 8, 6
LENGTH = jnp.array([2, 5, 1, 4], jnp.int32)


@functools.lru_cache
def make_params():
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(transformer(CONFIG).init, jax.random.key(0))
    return jax.tree.map(lambda x: random.normal(0.0, 0.4, x.shape).astype(x.dtype), shapes)


@jax.jit
def make_logits(params, tokens):
    policy = transformer(CONFIG)
    return jnp.einsum("btd,vd->btv", policy.hidden(params, tokens), policy.unembed(params))


def count(tokens, response_mask, fields):
    """Response tokens, plus ten for each one that is the prompt's `lucky` one."""
    lucky = response_mask & (tokens == fields["lucky"][:, None])
    return jnp.sum(response_mask, axis=1) + 10 * jnp.sum(lucky, axis=1)


SPEC = RolloutSpec(2, NEW, EOS, PAD, 1.0, (DeviceReward("count", count),))
FIELDS = {"lucky": jnp.array([0, 1, 2, 3], jnp.int32)}


@functools.partial(jax.jit, static_argnames="spec")
def roots(seed, spec=SPEC):
    prompts = jax.random.randint(jax.random.key(3), (4, 5), 0, PAD, jnp.int32)
    prompts = jnp.where(jnp.arange(5)[None, :] < LENGTH[:, None], prompts, PAD)
    return iid_rollouts(transformer(CONFIG), make_params(), prompts, LENGTH, FIELDS, jax.random.key(seed), spec=spec)


@functools.partial(jax.jit, static_argnames="spec")
def grow(prefixes, fields, seed=7, first_row=100, spec=SPEC):
    key = jax.random.key(seed)
    return continued_rollouts(
        transformer(CONFIG), make_params(), prefixes, fields, key, spec=spec, first_row=first_row
    )  # fmt: skip


def lengths(num):
    return jnp.repeat(LENGTH, num), jax.tree.map(lambda x: jnp.repeat(x, num), FIELDS)


def states(column, num=2, seed=0, spec=SPEC):
    """Roots, and each of them cut `column` tokens after its prompt."""
    rows, _ = roots(seed, spec)
    start, fields = lengths(num)
    return rows, cut(rows, start, start + column, rows.loss_mask.sum(axis=1) > column), fields


def test_a_greedy_row_cut_anywhere_grows_back():
    spec = SPEC._replace(num_generations=1, greedy=True)
    for column in range(4):
        whole, prefixes, fields = states(column, num=1, spec=spec)
        rows, _ = grow(prefixes, fields, spec=spec)
        valid = np.asarray(prefixes.is_valid)
        assert valid.any()
        np.testing.assert_array_equal(rows.tokens[valid], whole.tokens[valid])
        np.testing.assert_array_equal(rows.rewards[valid], whole.rewards[valid])
        np.testing.assert_array_equal(rows.row_data["truncated"][valid], whole.row_data["truncated"][valid])
        np.testing.assert_array_equal(response_columns(rows)[valid], response_columns(whole)[valid])


def test_what_is_sampled_is_scored_as_if_sampled_whole():
    _, prefixes, fields = states(2)
    rows, entropy = grow(prefixes, fields)
    logits = make_logits(make_params(), rows.tokens)[:, :-1]
    mask = np.asarray(rows.loss_mask)[:, 1:]
    assert mask.any()
    log_prob = features.log_prob(logits, rows.tokens[:, 1:])
    np.testing.assert_allclose(rows.logp_old[:, 1:][mask], log_prob[mask], atol=2e-5)
    np.testing.assert_allclose(entropy[:, 1:][mask], features.entropy(logits)[mask], atol=2e-5)


def test_prefix_sample_and_padding_lie_one_after_another():
    whole, prefixes, fields = states(3)
    rows, _ = grow(prefixes, fields)
    assert rows.tokens.shape == (16, 11) == (2 * whole.tokens.shape[0], whole.tokens.shape[1])
    for row, (tokens, mask) in enumerate(zip(np.asarray(rows.tokens), np.asarray(rows.loss_mask))):
        state = row // 2
        prompt, length = int(prefixes.prompt_length[state]), int(prefixes.length[state])
        np.testing.assert_array_equal(tokens[:length], whole.tokens[state, :length])
        if not prefixes.is_valid[state]:
            assert not mask.any() and not rows.row_data["is_valid"][row]
            continue
        num = int(mask.sum())
        assert mask[length : length + num].all() and 1 <= num <= prompt + NEW - length
        assert (tokens[length + num :] == PAD).all()
        ended = tokens[length + num - 1] == EOS
        assert ended or num == prompt + NEW - length
        assert bool(rows.row_data["truncated"][row]) != ended
        response = tokens[prompt : length + num]
        assert float(rows.rewards[row, 0]) == len(response) + 10 * np.sum(response == int(fields["lucky"][state]))
        assert rows.fork[row] == length and rows.row_data["prefix_length"][row] == 3
        assert rows.group[row] == state and rows.row_id[row] == 100 + row
        assert rows.parent[row] == whole.row_id[state]


def test_a_bare_prompt_is_a_root():
    whole, prefixes, fields = states(0)
    assert prefixes.is_valid.all() and (prefixes.parent == -1).all()
    spec = SPEC._replace(num_generations=1)
    rows, _ = grow(prefixes, fields, seed=0, first_row=0, spec=spec)
    np.testing.assert_array_equal(rows.tokens, whole.tokens, "one key and row_id: one draw")
    np.testing.assert_array_equal(rows.loss_mask, whole.loss_mask)


def test_columns_outside_the_response_and_a_spent_budget_are_no_states():
    rows, _ = roots(0)
    start, fields = lengths(2)
    every = jnp.ones(8, bool)
    assert not cut(rows, start, start - 1, every).is_valid.any()
    assert not cut(rows, start, jnp.full_like(start, 11), every).is_valid.any()
    assert not cut(rows, start, start, ~every).is_valid.any()
    full = Prefixes(rows.tokens, start + NEW, start, rows.row_id, every)
    grown, _ = grow(full._replace(length=jnp.minimum(full.length, 10)), fields)
    spent = np.repeat(np.asarray(start + NEW) <= 10, 2)
    assert spent.any() and not spent.all()
    assert not grown.loss_mask[spent].any() and not grown.row_data["is_valid"][spent].any()
    assert (grown.loss_mask[~spent].sum(axis=1) == 1).all(), "the last column is left"


@pytest.mark.parametrize("order", [[3, 1, 0, 2, 7, 6, 5, 4], [7, 6, 5, 4, 3, 2, 1, 0]])
def test_other_states_beside_a_state_change_nothing_but_its_row_id(order):
    _, prefixes, fields = states(1)
    order = np.array(order)
    spec = SPEC._replace(num_generations=1, greedy=True)
    rows, _ = grow(prefixes, fields, spec=spec)
    moved, _ = grow(*jax.tree.map(lambda x: x[order], (prefixes, fields)), spec=spec)
    np.testing.assert_array_equal(moved.tokens, rows.tokens[order])
    np.testing.assert_array_equal(moved.rewards, rows.rewards[order])

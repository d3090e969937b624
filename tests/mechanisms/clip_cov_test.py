"""Clip-Cov: who may be drawn, how many are, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import compose
from jentropy.base import initial_plan
from jentropy.mechanisms import clip_cov as module
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.clip_range import clip_range

WIDE = {"clip_cov_lb": 0.05, "clip_cov_ub": 5.0}


def dropped(plan, batch):
    return np.asarray(batch.loss_mask & (plan.pg_weight == 0.0))


def make(mechanism, epsilon_low=1.0, epsilon_high=float("inf")):
    return compose.chain(clip=clip_range(epsilon_low=epsilon_low, epsilon_high=epsilon_high), cov=mechanism)


def expected_candidates(batch, signals, advantage, epsilon):
    """By NumPy, from the formulas."""
    mask = np.asarray(batch.loss_mask)
    log_prob, advantage = (np.asarray(x, np.float64) for x in (signals.scores["log_prob"], advantage))
    covariance = (log_prob - log_prob[mask].mean()) * (advantage - advantage[mask].mean())
    ratio = np.exp(log_prob - np.asarray(batch.logp_old, np.float64))
    clipped = np.maximum(-ratio * advantage, -np.clip(ratio, 1 - epsilon, 1 + epsilon) * advantage) > -ratio * advantage
    band = (covariance > WIDE["clip_cov_lb"]) & (covariance < WIDE["clip_cov_ub"])
    return mask & band & ~clipped, mask & band


def test_candidates_are_in_the_band_and_not_clipped_by_the_ratio():
    batch, signals, advantage = toy.random_batch()
    mechanism = clip_cov(**WIDE)
    bounds = toy.update(clip_range(epsilon_low=0.5), signals, advantage)
    candidate = jax.jit(module.candidates)(bounds, mechanism.init(), signals)
    expected, band = expected_candidates(batch, signals, advantage, 0.5)
    np.testing.assert_array_equal(candidate, expected)
    assert 2 <= expected.sum() < band.sum()


@pytest.mark.parametrize(("ratio", "min_tokens"), [(0.1, 1), (0.001, 1), (0.001, 0), (0.001, 3), (1.0, 1)])
def test_how_many_tokens_lose_their_gradient(ratio, min_tokens):
    batch, signals, advantage = toy.random_batch()
    plan = toy.update(make(clip_cov(clip_cov_ratio=ratio, min_tokens=min_tokens, **WIDE)), signals, advantage)
    _, band = expected_candidates(batch, signals, advantage, 0.0)
    num_tokens = int(batch.loss_mask.sum())
    count = min(max(int(ratio * num_tokens), min_tokens), band.sum())
    chosen = dropped(plan, batch)
    assert chosen.sum() == count and not np.any(chosen & ~band)
    np.testing.assert_array_equal(plan.counted, batch.loss_mask)
    np.testing.assert_array_equal(plan.pg_weight, (batch.loss_mask & ~chosen).astype(np.float32))
    assert plan.metrics["clip_cov/selected_fraction"] == (count, num_tokens)
    assert plan.metrics["clip_cov/candidate_fraction"] == (band.sum(), num_tokens)


def test_the_ratio_zero_is_the_identity():
    batch, signals, advantage = toy.random_batch()
    plan = toy.update(clip_cov(clip_cov_ratio=0.0, **WIDE), signals, advantage)
    jax.tree.map(np.testing.assert_array_equal, plan.replace(metrics={}), initial_plan(batch, advantage))


def test_another_key_draws_others_and_the_order_of_rows_does_not_matter():
    batch, signals, advantage = toy.random_batch()
    mechanism = make(clip_cov(clip_cov_ratio=0.1, **WIDE))
    first = dropped(toy.update(mechanism, signals, advantage), batch)
    draws = {dropped(toy.update(mechanism, signals, advantage, key=k), batch).tobytes() for k in range(8)}
    assert len(draws) > 1
    order = jnp.array([4, 2, 0, 5, 1, 3])
    moved_batch, scores = jax.tree.map(lambda x: x[order], (batch, dict(signals.scores)))
    moved = toy.update(mechanism, toy.signals(moved_batch, **scores), advantage[order])
    np.testing.assert_array_equal(dropped(moved, moved_batch), first[order])


def test_empty_batch_and_equal_advantages_drop_nothing():
    batch, signals, advantage = toy.random_batch()
    empty = batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask))
    plan = toy.update(make(clip_cov(clip_cov_ratio=0.1, **WIDE)), signals.replace(batch=empty), advantage)
    assert plan.metrics["clip_cov/selected_fraction"] == (0.0, 0.0)
    plan = toy.update(make(clip_cov(clip_cov_ratio=0.1, **WIDE)), signals, jnp.full_like(advantage, 0.1))
    assert not dropped(plan, batch).any()


def test_garbage_outside_the_mask_does_not_matter():
    mechanism = make(clip_cov(clip_cov_ratio=0.1, **WIDE))
    clean, dirty = (toy.update(mechanism, *toy.random_batch(fill=fill)[1:]) for fill in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_drop_keeps_the_rest_of_the_plan():
    batch, _, advantage = toy.random_batch()
    plan = initial_plan(batch, advantage)
    selected = jnp.zeros_like(batch.loss_mask).at[0, 0].set(True)
    after = module.drop(plan, selected)
    assert after.pg_weight[0, 0] == 0.0
    np.testing.assert_array_equal(after.pg_weight.at[0, 0].set(1.0), plan.pg_weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_cov_ratio": 1.5}, r"clip_cov_ratio must be in \[0, 1\], got 1\.5"),
        ({"clip_cov_lb": 5.0}, r"clip_cov_ub must be above clip_cov_lb = 5\.0, got 5\.0"),
        ({"min_tokens": -1}, "min_tokens must be at least 0, got -1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        clip_cov(**options)

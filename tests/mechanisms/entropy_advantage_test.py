"""Entropy-shaped advantages: the bonus, its limit, and that no sign flips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy import compose
from jentropy.base import ENTROPY, initial_plan
from jentropy.mechanisms.clip_cov import clip_cov
from jentropy.mechanisms.entropy_advantage import entropy_advantage


def shape(advantage, entropy, mask=None, **options):
    advantage = np.asarray(advantage, np.float32)
    batch = toy.rollouts(np.ones(advantage.shape, bool) if mask is None else mask)
    signals = toy.signals(batch, log_prob=jnp.zeros(advantage.shape), entropy=np.asarray(entropy, np.float32))
    return toy.update(entropy_advantage(**options), signals, jnp.asarray(advantage))


def test_by_hand():
    advantage, entropy = [[1.0, 1.0, -1.0, -1.0, 0.0]], [[0.5, 4.0, 0.5, 4.0, 4.0]]
    plan = shape(advantage, entropy, entropy_adv_alpha=0.5, entropy_adv_kappa=2.0)
    np.testing.assert_array_equal(plan.advantage, [[1.25, 1.5, -0.75, -0.5, 0.0]])
    assert plan.metrics["entropy_advantage/bonus"] == (1.5, 5.0)
    assert plan.metrics["entropy_advantage/limited_fraction"] == (2.0, 4.0)
    assert entropy_advantage().outputs == (ENTROPY,)


def test_with_kappa_1_a_negative_advantage_ends_at_0():
    plan = shape([[-0.3, 0.3]], [[100.0, 100.0]], entropy_adv_kappa=1.0)
    np.testing.assert_array_equal(plan.advantage, np.array([[0.0, 0.6]], np.float32))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.floats(-100, 100, width=32), st.floats(0, 12, width=32)), min_size=4, max_size=4),
    st.floats(0, 50),
    st.floats(1.001, 50),
)
def test_no_sign_flips(tokens, alpha, kappa):
    advantage, entropy = np.array(tokens, np.float32).T[:, None]
    advantage[np.abs(advantage) < 1e-30] = 0.0  # denormal numbers have no two thirds
    shaped = np.asarray(shape(advantage, entropy, entropy_adv_alpha=alpha, entropy_adv_kappa=kappa).advantage)
    np.testing.assert_array_equal(np.sign(shaped), np.sign(advantage))
    assert np.all(shaped >= advantage)
    assert np.all(np.abs(shaped - advantage) <= np.abs(advantage) / kappa * 1.001 + 1e-30)


def test_tokens_without_an_advantage_stay_at_exactly_0():
    # An entropy that rounding has left below 0 would move them.
    assert not np.any(shape([[0.0, -0.0]], [[-1e-7, 3.0]]).advantage)


@pytest.mark.parametrize("options", [{"entropy_adv_alpha": 0.0}, {"entropy_adv_kappa": float("inf")}])
def test_neutral_settings(options):
    batch, signals, advantage = toy.random_batch()
    plan = toy.update(entropy_advantage(**options), signals, advantage)
    jax.tree.map(np.testing.assert_array_equal, plan.replace(metrics={}), initial_plan(batch, advantage))


def test_the_covariance_sees_the_shaped_advantage():
    _, signals, advantage = toy.random_batch()
    shaping, cov = entropy_advantage(), clip_cov(clip_cov_ratio=1.0, clip_cov_lb=0.05)
    both = toy.update(compose.chain(shaping=shaping, cov=cov), signals, advantage)
    shaped = toy.update(shaping, signals, advantage).advantage
    np.testing.assert_array_equal(both.pg_weight, toy.update(cov, signals, shaped).pg_weight)
    assert np.any(both.pg_weight != toy.update(cov, signals, advantage).pg_weight)


def test_empty_batch_and_garbage_outside_the_mask():
    clean, dirty = (toy.update(entropy_advantage(), *toy.random_batch(fill=fill)[1:]) for fill in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    plan = shape([[1.0]], [[np.nan]], mask=[[False]])
    assert plan.advantage == 0.0 and plan.metrics["entropy_advantage/bonus"] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_adv_alpha": -0.1}, r"entropy_adv_alpha must be finite and at least 0, got -0\.1"),
        ({"entropy_adv_alpha": float("inf")}, "entropy_adv_alpha must be finite and at least 0, got inf"),
        ({"entropy_adv_kappa": 0.5}, r"entropy_adv_kappa must be at least 1, got 0\.5"),
        ({"entropy_adv_kappa": float("nan")}, "entropy_adv_kappa must be at least 1, got nan"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        entropy_advantage(**options)

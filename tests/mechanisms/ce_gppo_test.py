"""CE-GPPO: the gradient of clipped tokens by hand, neutral settings, released code."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from golden_cases import DOUBLE, Case, close, make_test

from jentropy import compose, normalisers, surrogates
from jentropy.mechanisms.ce_gppo import ce_gppo
from jentropy.mechanisms.clip_range import clip_range

RATIO = np.array([[0.5, 0.5, 0.9, 0.0], [1.5, 1.5, 1.2, 2.0]])
ADVANTAGE = np.array([[-2.0, 2.0, -1.0, 5.0], [3.0, -3.0, 1.0, 0.0]], np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
LOW, HIGH = MASK & (RATIO < 0.8) & (ADVANTAGE < 0.0), MASK & (RATIO > 1.3) & (ADVANTAGE > 0.0)


def make(ratio=RATIO, mask=MASK):
    log_prob = np.where(mask, np.log(np.where(mask, ratio, 1.0)), 0.0)
    return toy.signals(toy.rollouts(mask, logp_old=np.zeros(mask.shape, np.float32)), log_prob=log_prob)


def clipped(**options):
    return compose.chain(clip=clip_range(epsilon_low=0.2, epsilon_high=0.3), ce=ce_gppo(**options))


def run(mechanism, signals, surrogate=surrogates.ratio, advantage=ADVANTAGE):
    plan = toy.update(mechanism, signals, jnp.asarray(advantage))
    return plan, *toy.loss_and_gradient(plan, signals, surrogate=surrogate, normaliser=normalisers.token_sum)


def test_by_hand():
    plan, value, gradient, metrics = run(clipped(beta1=0.5, beta2=2.0), make())
    scale = np.where(LOW, 0.5 * 0.8, np.where(HIGH, 2.0 * 1.3, RATIO)) * MASK
    np.testing.assert_allclose(gradient, -scale * ADVANTAGE, rtol=2e-6)
    np.testing.assert_allclose(value, -(scale * ADVANTAGE).sum(), rtol=2e-6)
    assert LOW.sum() == HIGH.sum() == 1
    assert plan.metrics["ce_gppo/low_fraction"] == plan.metrics["ce_gppo/high_fraction"] == (1.0, 7.0)
    assert metrics["actor/pg_clipfrac"] == (0.0, 7.0)


def test_a_side_with_beta_0_stays_clipped():
    ppo = run(clip_range(epsilon_low=0.2, epsilon_high=0.3), make())
    both = run(clipped(beta1=0.0, beta2=0.0), make())
    jax.tree.map(np.testing.assert_array_equal, ppo[1:], both[1:])
    _, _, gradient, _ = run(clipped(beta1=0.0), make())
    assert not np.any(gradient[LOW]) and np.all(gradient[HIGH] != 0.0)


def test_without_bounds_it_does_nothing():
    signals = make()
    plan = toy.update(ce_gppo(), signals, jnp.asarray(ADVANTAGE))
    np.testing.assert_array_equal(plan.pg_weight, MASK)
    assert plan.metrics["ce_gppo/low_fraction"][0] == plan.metrics["ce_gppo/high_fraction"][0] == 0.0


def test_weights_of_others_are_kept():
    signals = make()
    start = toy.update(clip_range(epsilon_low=0.2, epsilon_high=0.3), signals, jnp.asarray(ADVANTAGE))
    start = start.replace(pg_weight=start.pg_weight * 0.5)
    plan = toy.update(ce_gppo(), signals, jnp.asarray(ADVANTAGE), plan=start)
    whole = toy.update(clipped(), signals, jnp.asarray(ADVANTAGE))
    np.testing.assert_allclose(plan.pg_weight, whole.pg_weight / 2.0, rtol=1e-6)


def test_the_dual_clip_still_bounds():
    ratio = np.array([[0.5, 9.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    _, _, gradient, _ = run(clipped(beta1=0.5), make(ratio), surrogates.dual_clip(), np.full((2, 4), -1.0, np.float32))
    np.testing.assert_allclose(gradient[0], [0.4, 0.0, 1.0, 0.0], rtol=2e-6)


def test_far_policies_give_finite_numbers():
    ratio = np.exp(np.array([[-80.0, 80.0, 0.0, 0.0], [-80.0, 80.0, 0.0, 0.0]]))
    plan, value, gradient, _ = run(clipped(), make(ratio))
    assert np.isfinite(value) and np.all(np.isfinite(gradient)) and np.all(np.isfinite(plan.pg_weight))


def test_empty_batch_and_garbage():
    empty = toy.update(clipped(), make(mask=np.zeros_like(MASK)), jnp.asarray(ADVANTAGE))
    assert not np.any(empty.pg_weight)
    _, clean, advantage = toy.random_batch()
    dirty = toy.random_batch(fill=np.nan)[1:]
    plans = toy.update(clipped(), clean, advantage), toy.update(clipped(), *dirty)
    jax.tree.map(np.testing.assert_array_equal, *plans)


def test_one_update_per_rollout_has_no_effect():
    assert ce_gppo().min_updates == 2
    _, signals, advantage = toy.random_batch()
    signals = signals.replace(batch=signals.batch.replace(logp_old=signals.scores["log_prob"]))
    np.testing.assert_array_equal(toy.update(clipped(), signals, advantage).pg_weight, signals.batch.loss_mask)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [-0.5, float("inf"), float("nan")])
def test_refusals(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite and at least 0, got {value}"):
        ce_gppo(**{name: value})


def check_released_code(golden, precision):
    """`entropy_cegppo*`: the authors' loss, ε .2 and .28, dual clip 3, token mean over `N + 1e-8`."""
    case = Case({"hp_clip_ratio_high": np.float64(0.28), **golden}, precision)
    num_tokens = case.mask.sum()
    clip = clip_range(epsilon_low=case.hp["clip_ratio_low"], epsilon_high=case.hp["clip_ratio_high"])
    surrogate = surrogates.dual_clip(clip_ratio_c=case.hp["clip_ratio_c"])
    for key in (k for k in golden if k.startswith("loss_")):
        beta1, beta2 = map(float, re.fullmatch(r"loss_b([\d.]+)_([\d.]+)", key).groups())
        plan = case.plan(compose.chain(clip=clip, ce=ce_gppo(beta1=beta1, beta2=beta2)))
        value, gradient, _ = case.evaluate(plan, "token_mean", surrogate=surrogate)
        scale = num_tokens / (num_tokens + 1e-8)
        close(value * scale, golden[key], 1e-12)
        close(gradient * scale, golden[key.replace("loss", "grad")], 1e-12)


test_released_code = make_test({"entropy_cegppo*": (check_released_code, DOUBLE)})

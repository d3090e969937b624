"""The entropy bonus: its coefficient per token, that it is subtracted, and coefficients that follow a schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import compose, normalisers
from jentropy.base import ENTROPY, initial_plan
from jentropy.mechanisms.entropy_bonus import entropy_bonus


def test_minus_the_mean_entropy():
    batch, signals, advantage = toy.random_batch(fill=np.nan)
    mechanism = entropy_bonus(entropy_coef=0.5)
    plan = toy.update(mechanism, signals, advantage)
    num_tokens = int(batch.loss_mask.sum())
    np.testing.assert_allclose(plan.terms["entropy"], np.where(batch.loss_mask, -0.5 / num_tokens, 0.0), rtol=1e-6)
    assert mechanism.outputs == (ENTROPY,)
    np.testing.assert_array_equal(mechanism.terms["entropy"](signals.scores, plan, batch), signals.scores["entropy"])
    assert plan.metrics["actor/entropy_coef"] == (0.5, 1.0)


def test_tokens_without_policy_gradient_keep_their_bonus():
    batch, signals, advantage = toy.random_batch()

    def none_counted(plan, signals, key):
        del signals, key
        return plan.replace(counted=jnp.zeros_like(plan.counted), pg_weight=jnp.zeros_like(plan.pg_weight))

    chain = compose.chain(drop=compose.stateless(none_counted), bonus=entropy_bonus(entropy_coef=1.0))
    plan = toy.update(chain, signals, advantage)
    np.testing.assert_array_equal(plan.terms["entropy"] < 0.0, batch.loss_mask)


def test_normaliser():
    batch, signals, advantage = toy.random_batch()
    mechanism = entropy_bonus(entropy_coef=2.0, normaliser=normalisers.sequence_mean_token_mean)
    weight = normalisers.sequence_mean_token_mean(batch.loss_mask, batch)
    np.testing.assert_allclose(toy.update(mechanism, signals, advantage).terms["entropy"], -2.0 * weight, rtol=1e-6)


def test_zero_and_the_empty_batch_are_neutral():
    batch, signals, advantage = toy.random_batch()
    assert not np.any(toy.update(entropy_bonus(), signals, advantage).terms["entropy"])
    empty = signals.replace(batch=batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask)))
    assert not np.any(toy.update(entropy_bonus(entropy_coef=1.0), empty, advantage).terms["entropy"])


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_refusals(value):
    with pytest.raises(ValueError, match=f"entropy_coef must be finite and at least 0, got {value}"):
        entropy_bonus(entropy_coef=value)


@dataclasses.dataclass(frozen=True)
class Decay:
    start: float

    def __call__(self, step):
        return self.start / (1.0 + step.astype(jnp.float32))


def run(mechanism, step, state=None):
    batch, signals, advantage = toy.random_batch()
    signals = signals.replace(step=jnp.int32(step))
    state = mechanism.init() if state is None else state
    plan, state = jax.jit(mechanism.update)(initial_plan(batch, advantage), state, signals, jax.random.key(0))
    return plan, state


@pytest.mark.parametrize("step", [0, 3])
def test_a_schedule_is_a_function_of_the_rollout(step):
    mechanism = entropy_bonus(entropy_coef=Decay(0.5))
    plan, state = run(mechanism, step)
    expected, _ = run(entropy_bonus(entropy_coef=0.5 / (1 + step)), 0)
    np.testing.assert_array_equal(plan.terms["entropy"], expected.terms["entropy"])
    assert np.any(plan.terms["entropy"])
    assert plan.metrics["actor/entropy_coef"] == (0.5 / (1 + step), 1.0)
    assert state.entropy_coef == 0.5 / (1 + step)


def test_which_schedules_share_a_compilation():
    assert entropy_bonus(entropy_coef=Decay(0.5)).update == entropy_bonus(entropy_coef=Decay(0.5)).update
    assert entropy_bonus(entropy_coef=Decay(0.5)).update != entropy_bonus(entropy_coef=Decay(0.25)).update
    assert entropy_bonus(entropy_coef=Decay(0.5)).update != entropy_bonus(entropy_coef=0.5).update


def test_a_schedule_may_return_a_number():
    plan, _ = run(entropy_bonus(entropy_coef=lambda step: 0.25), 0)
    assert plan.metrics["actor/entropy_coef"] == (0.25, 1.0)


@pytest.mark.parametrize(("value", "bad"), [(0.0, 0.0), (0.1, 0.0), (-0.1, 1.0), (np.inf, 1.0), (np.nan, 1.0)])
def test_values_of_a_schedule_out_of_range_are_errors_without_effect(value, bad):
    plan, state = run(entropy_bonus(entropy_coef=lambda step: jnp.float32(value)), 0)
    assert plan.metrics["error/the schedule's entropy_coef is negative or not finite"] == (bad, 1.0)
    used = 0.0 if bad else np.float32(value)
    assert state.entropy_coef == used and np.any(plan.terms["entropy"]) == (used > 0.0)


def test_a_schedule_of_the_wrong_shape_is_refused():
    with pytest.raises(AssertionError, match="rank"):
        run(entropy_bonus(entropy_coef=lambda step: jnp.zeros(2)), 0)

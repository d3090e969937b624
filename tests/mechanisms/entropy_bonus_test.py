"""The entropy bonus: its coefficient per token, and that it is subtracted."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import compose, normalisers
from jentropy.base import ENTROPY
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

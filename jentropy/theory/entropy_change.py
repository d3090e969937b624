"""What moves the entropy: its change as a covariance over the actions, on whole distributions.

In one state with policy π = softmax(z):

    ΔH ≈ -Cov_{a~π}(log π(a), Δz(a))              Lemma 1, any small change of the logits
    ΔH ≈ -η Cov_{a~π}(log π(a), π(a) A(a))        Theorem 1, a step of policy gradient, Δz = η π A
    ΔH ≈ -η Cov_{a~π}(log π(a), A(a))             Theorem 2, a step of natural policy gradient, Δz = η A

All are first order: exact as a derivative, with an error that falls as η². The step is one of ascent: the entropy falls
where likely actions have the larger advantages. (Accounts that have Δz = -η π A describe descent.)

Logits are `[..., V]`, -inf where an id is illegal: such an id has probability 0, and what other arrays hold there never
counts. Divide them by the temperature of sampling first. Results are float32, or float64 for float64 logits.
`theory.covariance` has the same covariances on samples.

Reference: arXiv 2505.22617, section 3.
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp

from jentropy.base import Array
from jentropy.features import LOG_ZERO, statistic_dtype


class _Distribution(NamedTuple):
    """π over the legal ids, `[..., V]`: probabilities, log π up to a constant per row, which ids are legal."""

    probability: Array
    log: Array
    legal: Array

    def mean(self, values: Array) -> Array:
        """E_π[values], `[..., 1]`; values 0 where illegal."""
        return jnp.sum(self.probability * values, axis=-1, keepdims=True)


def _distribution(logits: Array) -> _Distribution:
    chex.assert_type(logits, float)
    logits = logits.astype(statistic_dtype(logits.dtype))
    legal = logits != -jnp.inf
    shift = jnp.max(jnp.where(legal, logits, LOG_ZERO), axis=-1, keepdims=True)
    log = jnp.where(legal, logits - shift, 0.0)
    weight = jnp.where(legal, jnp.exp(log), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return _Distribution(weight / jnp.where(total > 0.0, total, 1.0), log, legal)


def _on_legal(pi: _Distribution, values: Array) -> Array:
    chex.assert_equal_shape([pi.log, values])
    return jnp.where(pi.legal, values.astype(pi.log.dtype), 0.0)


def _covariance(pi: _Distribution, values: Array) -> Array:
    return jnp.sum(pi.probability * (pi.log - pi.mean(pi.log)) * (values - pi.mean(values)), axis=-1)


def policy_covariance(logits: Array, values: Array) -> Array:
    """Cov_{a~π}(log π(a), values(a)), the expectation over all actions; `[...]`.

    Args:
      logits: `[..., V]` float, of π.
      values: `[..., V]` float, whatever at illegal ids.
    """
    pi = _distribution(logits)
    return _covariance(pi, _on_legal(pi, values))


def lemma1(logits_before: Array, logits_after: Array) -> Array:
    """The predicted change of entropy from one policy to the other: `-Cov_{a~π_before}(log π(a), z_after - z_before)`.

    A constant added to either logits changes nothing. `head.pair_scores` gives the same covariance from hidden states
    without an array over the vocabulary.

    Args:
      logits_before: `[..., V]` float.
      logits_after: `[..., V]` float, with the same legal ids; a row in which they differ gives NaN, since no first
        order exists there.

    Returns:
      `[...]`, nats.

    Reference: 2505.22617, Lemma 1.
    """
    chex.assert_equal_shape([logits_before, logits_after])
    before = _distribution(logits_before)
    is_same = jnp.all(before.legal == (logits_after != -jnp.inf), axis=-1)
    change = _on_legal(before, logits_after) - _on_legal(before, logits_before)
    return jnp.where(is_same, -_covariance(before, change), jnp.nan)


def _policy_gradient(pi: _Distribution, advantage: Array, centre: bool) -> Array:
    """The gradient of E_π[A] with respect to the logits, or Proposition 1's formula for it; `[..., V]`."""
    advantage = _on_legal(pi, advantage)
    return pi.probability * (advantage - pi.mean(advantage) if centre else advantage)


def _rate(learning_rate: Array | float, dtype: jnp.dtype) -> Array:
    return jnp.asarray(learning_rate).astype(dtype)


def _ascend(logits: Array, learning_rate: Array | float, direction: Array) -> Array:
    rate = _rate(learning_rate, logits.dtype)
    rate = rate[..., None] if rate.ndim else rate
    return jnp.where(logits == -jnp.inf, logits, logits + rate * direction.astype(logits.dtype))


def policy_gradient_step(
    logits: Array, advantage: Array, learning_rate: Array | float, *, centre: bool = True
) -> Array:
    """The logits of a tabular softmax policy after a step of gradient ascent: `z + η π(a)(A(a) - E_π A)`.

    That is the exact gradient of E_π[A], A fixed, for any A. Proposition 1 writes `η π(a) A(a)`, which is the same for
    a true advantage, E_π A = 0, and another step otherwise: `centre=False` takes it literally.

    Args:
      logits: `[..., V]` float.
      advantage: `[..., V]` float, of every action.
      learning_rate: η, scalar or `[...]`.
      centre: subtract E_π A.

    Returns:
      `[..., V]`; illegal ids stay illegal.

    Reference: 2505.22617, Proposition 1.
    """
    return _ascend(logits, learning_rate, _policy_gradient(_distribution(logits), advantage, centre))


def policy_gradient_change(
    logits: Array, advantage: Array, learning_rate: Array | float, *, centre: bool = True
) -> Array:
    """The predicted change of entropy in `policy_gradient_step`: `-η Cov_{a~π}(log π(a), π(a)(A(a) - E_π A))`.

    Theorem 1 as printed has `π(a) A(a)`; both agree when E_π A = 0, which it presumes, and differ by
    `η E_π[A] Cov(log π, π)` otherwise. `centre=False` is the printed form, and fits the printed step.

    Args and errors as in `policy_gradient_step`.

    Returns:
      `[...]`, nats.

    Reference: 2505.22617, Theorem 1.
    """
    pi = _distribution(logits)
    change = _covariance(pi, _policy_gradient(pi, advantage, centre))
    return -_rate(learning_rate, change.dtype) * change


def natural_gradient_step(logits: Array, advantage: Array, learning_rate: Array | float) -> Array:
    """The logits of a tabular softmax policy after a step of natural policy gradient: `z + η A(a)`.

    A constant added to A changes the logits by a constant and the policy not at all.

    Args:
      logits: `[..., V]` float.
      advantage: `[..., V]` float, of every action.
      learning_rate: η, scalar or `[...]`.

    Returns:
      `[..., V]`; illegal ids stay illegal.

    Reference: 2505.22617, Theorem 2.
    """
    return _ascend(logits, learning_rate, _on_legal(_distribution(logits), advantage))


def natural_gradient_change(logits: Array, advantage: Array, learning_rate: Array | float) -> Array:
    """The predicted change of entropy in `natural_gradient_step`: `-η Cov_{a~π}(log π(a), A(a))`, `[...]`, nats.

    Args as in `natural_gradient_step`.

    Reference: 2505.22617, Theorem 2.
    """
    change = policy_covariance(logits, advantage)
    return -_rate(learning_rate, change.dtype) * change

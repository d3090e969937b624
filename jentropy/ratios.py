"""Log-ratios of two policies on sampled tokens, and what is computed from them safely."""

import math

import chex
import jax.numpy as jnp

from jentropy.base import Array

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ±20 nats before they are exponentiated."""


def clip(x: Array, low: Array | float, high: Array | float) -> Array:
    """Clips to `[low, high]` with gradient 1 inside and exactly at the bounds, and 0 outside, as `torch.clamp` has.

    `jnp.clip` splits the gradient at a bound in two halves.
    """
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def log_ratio(log_prob: Array, other: Array, mask: Array) -> Array:
    """`log_prob - other` on the mask, 0 elsewhere, whatever the arrays hold there.

    Args:
      log_prob: `[B, T]` nats.
      other: `[B, T]` nats.
      mask: `[B, T]` bool.
    """
    chex.assert_rank([log_prob, other, mask], 2)
    chex.assert_equal_shape([log_prob, other, mask])
    return jnp.where(mask, log_prob, 0.0) - jnp.where(mask, other, 0.0)


def k3(x: Array) -> Array:
    """`eˣ - 1 - x`: with `x = log q - log p` on samples of p, a non-negative unbiased estimate of D_KL(p || q).

    Above `MAX_LOG_RATIO` it continues along its tangent, so neither the value overflows nor the gradient vanishes where
    the two policies are furthest apart.

    Reference: Schulman, "Approximating KL divergence" (2020).
    """
    far = x > MAX_LOG_RATIO
    inner = jnp.where(far, 0.0, x)
    slope = math.expm1(MAX_LOG_RATIO)
    return jnp.where(far, slope * (x - MAX_LOG_RATIO) + (slope - MAX_LOG_RATIO), jnp.expm1(inner) - inner)

"""How token losses are averaged: the weight `[B, T]` of each counted token, 0 for the others.

`counted` is the plan's; "the batch" is the whole update batch, whatever the number of micro-batches. Rows without a
counted token are not counted as rows. With nothing counted all weights are 0.
"""

import dataclasses

import chex
import jax.numpy as jnp

from jentropy.base import Array, Normaliser, Rollouts, require


def _weight(counted: Array, denominator: Array) -> Array:
    """`1 / max(denominator, 1)` on counted tokens."""
    return jnp.where(counted, 1.0 / jnp.maximum(denominator, 1.0), 0.0)


def _lengths(counted: Array, batch: Rollouts) -> tuple[Array, Array]:
    """Counted tokens of each row `[B, 1]` and the number of rows that have any `[1, 1]`, as floats."""
    chex.assert_rank(counted, 2)
    length = jnp.sum(counted, axis=1, keepdims=True, dtype=batch.logp_old.dtype)
    return length, jnp.sum(length > 0.0, keepdims=True, dtype=length.dtype)


def token_mean(counted: Array, batch: Rollouts) -> Array:
    """Mean over all counted tokens: `1 / N`. Long responses weigh more than short ones.

    Known as `token-mean` (verl), `dapo` (TRL). Reference: 2503.14476, eq. 12.

    Args:
      counted: `[B, T]` bool.
      batch: the update batch.
    """
    length, _ = _lengths(counted, batch)
    return _weight(counted, jnp.sum(length, keepdims=True))


def sequence_mean_token_mean(counted: Array, batch: Rollouts) -> Array:
    """Mean over rows of each row's token mean: `1 / (n_row · rows)`.

    Known as `seq-mean-token-mean` (verl, which adds 1e-8 to `n_row`), `grpo` (TRL, which counts empty rows too).
    Reference: 2402.03300, eq. 3.

    Args:
      counted: `[B, T]` bool.
      batch: the update batch.
    """
    length, rows = _lengths(counted, batch)
    return _weight(counted, length * rows)


def sequence_mean_token_sum(counted: Array, batch: Rollouts) -> Array:
    """Mean over rows of each row's token sum: `1 / rows`. Known as `seq-mean-token-sum` (verl).

    Args:
      counted: `[B, T]` bool.
      batch: the update batch.
    """
    _, rows = _lengths(counted, batch)
    return _weight(counted, rows)


def token_sum(counted: Array, batch: Rollouts) -> Array:
    """The plain sum: weight 1. Known as `token-sum` (verl).

    Args:
      counted: `[B, T]` bool.
      batch: the update batch.
    """
    chex.assert_rank(counted, 2)
    return counted.astype(batch.logp_old.dtype)


@dataclasses.dataclass(frozen=True)
class _FixedLength:
    length: int

    def __call__(self, counted: Array, batch: Rollouts) -> Array:
        _, rows = _lengths(counted, batch)
        return _weight(counted, rows * self.length)


def fixed_length(*, length: int) -> Normaliser:
    """Token sums divided by one constant length, mean over rows: `1 / (rows · length)`.

    Known as `seq-mean-token-sum-norm` with `loss_scale_factor` (verl), `dr_grpo` (TRL, which counts empty rows too).
    Without a factor verl divides by the padded width of the micro-batch, which varies; here the length is required.

    Args:
      length: usually the largest response length, in tokens; at least 1.

    Raises:
      ValueError: `length` is below 1.

    Reference: Dr. GRPO, 2503.20783.

    >>> fixed_length(length=16) == fixed_length(length=16)
    True
    """
    require(length >= 1, "length", length, "at least 1")
    return _FixedLength(length)

"""The entropy ledger of one rollout: a change of entropy, and predictions of it, split among the tokens.

"Tokens" are all under the loss mask of the rollout, N of them. A partition is `{part: [B, T] bool}`; its parts are
disjoint and cover the mask. A part's contribution is the sum of a value over its tokens over N, so that the
contributions of a partition add up to the mean over all tokens. Everything is `(sum, count)`, as metrics are.
"""

from collections.abc import Mapping
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Metrics, Rollouts

Partition: TypeAlias = Mapping[str, Array]
"""Part -> `[B, T]` bool; disjoint, their union is the loss mask."""

DIFFICULTY = ("0", "0.25", "0.5", "0.75", "1-", "1")
"""Bins of group accuracy, the hardest first: 0, (0, .25], (.25, .5], (.5, .75], (.75, 1), 1."""

TOP_FRACTIONS = ("0.0002", "0.002", "0.02")
"""Of the tokens with the largest absolute covariance; each part is without those before it."""


def group_accuracy(rollouts: Rollouts) -> Array:
    """For each row the mean of the first reward column over the rows of its group in which it is valid, `[B]`.

    The accuracy of a group where the first reward is 0 or 1. A group in which no such reward is valid has 0.
    """
    reward, valid = rollouts.rewards[:, 0], outcome.valid_rewards(rollouts)[:, 0]
    return stats.group_mean(reward, rollouts.group, valid)


def by_difficulty(difficulty: Array, mask: Array) -> Partition:
    """Tokens by the bin of their group's accuracy, see `DIFFICULTY`.

    Args:
      difficulty: `[B]` int32, of the row's group, see `theory.covariance.difficulty_bin`.
      mask: `[B, T]` bool.
    """
    chex.assert_rank([difficulty, mask], [1, 2])
    return {name: mask & (difficulty == index)[:, None] for index, name in enumerate(DIFFICULTY)}


def by_sign(advantage: Array, mask: Array) -> Partition:
    """Tokens by the sign of their advantage, `[B, T]`; NaN counts as zero."""
    negative, positive = mask & (advantage < 0.0), mask & (advantage > 0.0)
    return {"negative": negative, "zero": mask & ~negative & ~positive, "positive": positive}


def by_mark(mark: Array, mask: Array, yes: str, no: str) -> Partition:
    """Tokens that are marked, `[B, T]` bool, and the others."""
    return {yes: mask & mark, no: mask & ~mark}


def by_covariance_rank(covariance: Array, mask: Array, row_id: Array) -> Partition:
    """The ⌊q N⌋ tokens of the largest absolute covariance, for each q of `TOP_FRACTIONS`, and the rest.

    Args:
      covariance: `[B, T]`, see `theory.covariance.token_covariances`.
      mask: `[B, T]` bool.
      row_id: `[B]` int32; ties go to the lowest `(row_id, column)`.
    """
    chex.assert_rank([covariance, mask, row_id], [2, 2, 1])
    number = stats.count_true(mask)
    k = jnp.stack([stats.fraction_of(number, stats.fraction_parts(float(q))) for q in TOP_FRACTIONS])
    top = jax.vmap(stats.top_k_mask, (None, None, 0, None))(jnp.abs(covariance), mask, k, row_id)
    parts, inner = {}, jnp.zeros_like(mask)
    for q, chosen in zip(TOP_FRACTIONS, top):
        parts[q], inner = chosen & ~inner, chosen
    return {**parts, "rest": mask & ~inner}


def contributions(values: Mapping[str, Array], partitions: Mapping[str, Partition], mask: Array) -> Metrics:
    """`<partition>/<part>/<quantity>` as `(sum over the part, N)`, for every value and for `fraction`, the share of N.

    Args:
      values: `[B, T]` by the name of the quantity.
      partitions: by name.
      mask: `[B, T]` bool.
    """
    chex.assert_equal_shape([mask, *values.values()])
    dtype = jnp.result_type(*values.values())
    counted = {**values, "fraction": jnp.ones(mask.shape, dtype)}
    stacked = jnp.where(mask, jnp.stack(list(counted.values())), 0.0)
    number, found = jnp.sum(mask, dtype=dtype), {}
    for partition, parts in partitions.items():
        chosen = jnp.stack(list(parts.values())).astype(dtype)
        sums = jnp.einsum("pbt,qbt->pq", chosen, stacked, precision=jax.lax.Precision.HIGHEST)
        for i, part in enumerate(parts):
            found |= {f"{partition}/{part}/{quantity}": (sums[i, j], number) for j, quantity in enumerate(counted)}
    return found

"""The covariance of log-probability and advantage on samples: what the theorems say moves the entropy.

On tokens, over the whole batch; on responses, per prompt (the bandit view: the prompt is the state, the whole response
the action); by difficulty of the prompt; and how few tokens hold most of it. A positive covariance lowers the entropy.

Values are in nats times units of the advantage. What is masked out may be NaN; nothing sorts.

Reference: arXiv 2505.22617, sections 3 and 4.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy import stats
from jentropy.base import Array, require

# Tokens and responses.


def token_covariances(log_prob: Array, advantage: Array, mask: Array) -> Array:
    """Each token's part `(log π_t - mean log π)(A_t - mean A)`, `[B, T]`, 0 outside the mask.

    The means are over all tokens of the batch. With means over the tokens of one response every part would be 0: an
    outcome advantage is one number per response, so it would equal its mean. Exactly 0 everywhere if the advantage, or
    the log-probability, is the same on all tokens.

    Args:
      log_prob: `[B, T]` float, of the sampled tokens.
      advantage: `[B, T]` float.
      mask: `[B, T]` bool.

    Reference: 2505.22617, section 4.2.
    """
    flat = stats.is_constant(advantage, mask) | stats.is_constant(log_prob, mask)
    return jnp.where(flat, 0.0, stats.cross_deviation(log_prob, advantage, mask))


def token_covariance(log_prob: Array, advantage: Array, mask: Array, *, ddof: int = 0) -> Array:
    """Cov(log π_t, A_t) over the n tokens of the batch: `Σ token_covariances / max(n - ddof, 1)`, a scalar.

    Args as in `token_covariances`.
    """
    parts = token_covariances(log_prob, advantage, mask)
    return jnp.sum(parts) / jnp.maximum(stats.count_true(mask) - ddof, 1).astype(parts.dtype)


class GroupCovariance(NamedTuple):
    """By group id, `[B]` each.

    Attributes:
      covariance: Cov(log π(y|x), A(y)) over the responses of the group; 0 for fewer than two.
      num_responses: int32, valid responses with a token; 0 for an id that does not occur.
    """

    covariance: Array
    num_responses: Array

    @property
    def mean(self) -> Array:
        """Over the prompts that have a response, a scalar: each prompt weighs the same."""
        return stats.masked_mean(self.covariance, self.num_responses > 0)


def response_covariance(
    sequence_log_prob: Array,
    advantage: Array,
    lengths: Array,
    group: Array,
    valid: Array,
    *,
    ddof: int = 0,
    length_normalised: bool = True,
) -> GroupCovariance:
    """`group_covariance` of rows in any order, in groups of any size.

    Args:
      sequence_log_prob: `[B]` float, Σ_t log π(y_t) of each response.
      advantage: `[B]` float, of the whole response.
      lengths: `[B]` int32, tokens; a response without one counts for nothing.
      group: `[B]` int32 in `[0, B)`, the prompt.
      valid: `[B]` bool.
      ddof: as in `group_covariance`.
      length_normalised: as in `group_covariance`.

    Returns:
      By group id; `.mean` averages over the prompts.
    """
    require(ddof >= 0, "ddof", ddof, "at least 0")
    chex.assert_rank([sequence_log_prob, advantage, lengths, group, valid], 1)
    chex.assert_type([lengths, group], int)
    used = valid & (lengths > 0)
    log_prob = sequence_log_prob
    if length_normalised:
        log_prob = jnp.where(used, log_prob, 0.0) / jnp.maximum(lengths, 1).astype(log_prob.dtype)
    deviations = [jnp.where(used, x - stats.group_mean(x, group, used), 0.0) for x in (log_prob, advantage)]
    is_flat = stats.group_is_constant(advantage, group, used) | stats.group_is_constant(log_prob, group, used)
    product = jnp.where(is_flat, 0.0, deviations[0] * deviations[1])
    count = jax.ops.segment_sum(used.astype(jnp.int32), group, num_segments=group.size)
    total = jax.ops.segment_sum(product, group, num_segments=group.size)
    return GroupCovariance(total / jnp.maximum(count - ddof, 1).astype(total.dtype), count)


def group_covariance(
    sequence_log_prob: Array,
    advantage: Array,
    lengths: Array,
    *,
    ddof: int = 0,
    length_normalised: bool = True,
) -> Array:
    """Per prompt, Cov over its G responses of (log π(y|x), A(y)): the bandit view, whose action is the response.

    The paper plots the mean over prompts against -ΔH of a step. Exactly 0 for one response, or for equal advantages.

    Args:
      sequence_log_prob: `[P, G]` float, Σ_t log π(y_t) of each response.
      advantage: `[P, G]` float, of the whole response.
      lengths: `[P, G]` int32, tokens; a response without one counts for nothing.
      ddof: the sum is divided by max(n - ddof, 1), n responses; the paper does not say.
      length_normalised: divide log π(y|x) by the length first, as in the paper's measurements.

    Returns:
      `[P]`.

    Raises:
      ValueError: `ddof` is negative.

    Reference: 2505.22617, section 3.4.
    """
    chex.assert_rank([sequence_log_prob, advantage, lengths], 2)
    chex.assert_equal_shape([sequence_log_prob, advantage, lengths])
    num_prompts, size = sequence_log_prob.shape
    group = jnp.repeat(jnp.arange(num_prompts, dtype=jnp.int32), size)
    found = response_covariance(
        sequence_log_prob.reshape(-1),
        advantage.reshape(-1),
        lengths.reshape(-1),
        group,
        jnp.ones(group.shape, bool),
        ddof=ddof,
        length_normalised=length_normalised,
    )
    return found.covariance[:num_prompts]


# By difficulty, and by size.

DIFFICULTY_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
_ROUNDING = 1e-5


def difficulty_bin(accuracy: Array, edges: Sequence[float] = DIFFICULTY_EDGES) -> Array:
    """Which bin an accuracy falls into, int32, shape of `accuracy`; bin 0 is the hardest.

    n edges e make n + 1 bins: `a <= e_0`, `(e_0, e_1]`, ..., `(e_{n-2}, e_{n-1})` open at both ends, `a >= e_{n-1}`. By
    default prompts never solved and always solved have bins of their own, with four between them. An accuracy within
    1e-5 of an edge counts as the edge.

    Args:
      accuracy: float, of the responses of a prompt.
      edges: ascending, at least two.

    Raises:
      ValueError: the edges are fewer than two or do not ascend.
    """
    edges = [float(edge) for edge in edges]
    ascend = len(edges) >= 2 and all(low < high for low, high in itertools.pairwise(edges))
    require(ascend, "edges", edges, "at least two, in ascending order")
    passed = [accuracy > edge + _ROUNDING for edge in edges[:-1]] + [accuracy >= edges[-1] - _ROUNDING]
    return jnp.sum(jnp.stack(passed), axis=0, dtype=jnp.int32)


class DifficultyBins(NamedTuple):
    """Of each bin of difficulty, `[num edges + 1]` each: the mean over its prompts (0 for none), and their number."""

    mean: Array
    num_prompts: Array


def covariance_by_difficulty(
    covariance: Array,
    accuracy: Array,
    edges: Sequence[float] = DIFFICULTY_EDGES,
    *,
    valid: Array | None = None,
) -> DifficultyBins:
    """The mean covariance of the prompts of each difficulty; in the paper the hard ones have the smallest.

    Args:
      covariance: `[P]` float, see `group_covariance`.
      accuracy: `[P]` float, the share of right responses of each prompt.
      edges: of the bins, see `difficulty_bin`.
      valid: `[P]` bool, prompts that count; all by default.

    Raises:
      ValueError: see `difficulty_bin`.

    Reference: 2505.22617, section 3.4.
    """
    chex.assert_rank([covariance, accuracy], 1)
    chex.assert_equal_shape([covariance, accuracy])
    valid = jnp.ones(covariance.shape, bool) if valid is None else valid
    index, num_bins = difficulty_bin(accuracy, edges), len(edges) + 1
    count = jax.ops.segment_sum(valid.astype(jnp.int32), index, num_segments=num_bins)
    total = jax.ops.segment_sum(jnp.where(valid, covariance, 0.0), index, num_segments=num_bins)
    return DifficultyBins(total / jnp.maximum(count, 1).astype(total.dtype), count)


CONCENTRATION_FRACTIONS = (2e-4, 2e-3, 2e-2)


def concentration(covariance: Array, mask: Array, fractions: Sequence[float] = CONCENTRATION_FRACTIONS) -> Array:
    """The share of Σ |cov| that the tokens of largest |cov| hold, for each fraction f of the n tokens.

    Where f · n is no whole number of tokens, the next largest token counts in part: of .4 tokens, .4 of the largest
    value. So the share means the same in batches of any size; it is f if all values are equal. 0 if all are 0.

    Args:
      covariance: `[B, T]` float, see `token_covariances`.
      mask: `[B, T]` bool.
      fractions: each in [0, 1].

    Returns:
      `[len(fractions)]`, in [0, 1].

    Raises:
      ValueError: a fraction is outside [0, 1].

    Reference: 2505.22617, section 4.1.
    """
    chex.assert_equal_shape([covariance, mask])
    size, count = jnp.abs(covariance), stats.count_true(mask)
    whole = stats.masked_sum(size, mask)

    def top(parts: stats.FractionParts) -> Array:
        num, rest = stats.fraction_divmod(count, parts)
        bound = stats.order_statistic(size, mask, count - 1 - num)
        above = mask & (size > bound)
        left = (num - stats.count_true(above)).astype(size.dtype)
        left = left + rest.astype(size.dtype) / parts.denominator.astype(size.dtype)
        return stats.masked_sum(size, above) + left * bound

    parts = [stats.fraction_parts(fraction) for fraction in fractions]
    shares = jax.vmap(top)(jax.tree.map(lambda *x: jnp.stack(x), *parts))
    return jnp.where(whole > 0.0, shares / jnp.where(whole > 0.0, whole, 1.0), 0.0)

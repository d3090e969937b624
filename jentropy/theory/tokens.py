"""Forking tokens: which tokens the policy chooses where its entropy is high, over a run, before and after training.

A token's entropy is that of the distribution it was drawn from: H_t for `tokens[:, t]`, in nats. `accumulate` adds up
count and sum by token id on the device; `rows` and `compare` make tables of them on the host. Few tokens with a high
mean entropy are the forks, at which a response takes its way; most follow from what stands before them.

Reference: arXiv 2506.01939, section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jentropy.base import Array, require

Decode: TypeAlias = Callable[[int], str]
"""Token id -> its text."""


class TokenTable(NamedTuple):
    """By token id, `[V]` each: how often it was chosen, int32, and the sum of the entropies there, float32, nats."""

    count: Array
    entropy_sum: Array

    @property
    def mean_entropy(self) -> Array:
        """Nats, `[V]`; 0 for a token that was never chosen."""
        return self.entropy_sum / jnp.maximum(self.count, 1).astype(self.entropy_sum.dtype)


def empty_table(vocab_size: int) -> TokenTable:
    """The table before any token.

    Args:
      vocab_size: V, at least 1.

    Raises:
      ValueError: `vocab_size` is below 1.
    """
    require(vocab_size >= 1, "vocab_size", vocab_size, "at least 1")
    return TokenTable(jnp.zeros(vocab_size, jnp.int32), jnp.zeros(vocab_size, jnp.float32))


def accumulate(table: TokenTable, tokens: Array, entropy: Array, mask: Array) -> TokenTable:
    """The table with the tokens of a batch added.

    Args:
      table: of all batches before.
      tokens: `[B, T]` int. An id outside `[0, V)` is not counted.
      entropy: `[B, T]` float, nats, of the distribution each token was drawn from; whatever outside the mask.
      mask: `[B, T]` bool, response tokens.
    """
    chex.assert_equal_shape([tokens, entropy, mask])
    chex.assert_type([tokens, entropy, mask], [int, float, bool])
    num_ids = table.count.shape[0]
    used = mask & (tokens >= 0) & (tokens < num_ids)
    ids = jnp.where(used, tokens, 0).reshape(-1)

    def by_id(values: Array) -> Array:
        return jax.ops.segment_sum(values.reshape(-1), ids, num_segments=num_ids)

    values = jnp.where(used, entropy, 0.0).astype(table.entropy_sum.dtype)
    return TokenTable(table.count + by_id(used.astype(jnp.int32)), table.entropy_sum + by_id(values))


def merge(one: TokenTable, other: TokenTable) -> TokenTable:
    """The table of the tokens of both, of one vocabulary."""
    chex.assert_equal_shape([one.count, other.count])
    return TokenTable(one.count + other.count, one.entropy_sum + other.entropy_sum)


@dataclass(frozen=True)
class TokenRow:
    """One token of a table.

    Attributes:
      token: its id.
      text: its text; `<id>` without a function that knows.
      count: how often it was chosen.
      fraction: of all tokens of the table, those left out included.
      mean_entropy: nats.
    """

    token: int
    text: str
    count: int
    fraction: float
    mean_entropy: float


@dataclass(frozen=True)
class TokenChange:
    """One token of two tables; what is None has no value, since the token was not chosen there.

    Attributes:
      token: its id.
      text: its text; `<id>` without a function that knows.
      count_before: how often it was chosen in the first table.
      count_after: in the second.
      mean_entropy_before: nats.
      mean_entropy_after: nats.
    """

    token: int
    text: str
    count_before: int
    count_after: int
    mean_entropy_before: float | None
    mean_entropy_after: float | None

    @property
    def change(self) -> float | None:
        """Mean entropy after minus before, nats; None for a token that only one of the tables has."""
        if self.mean_entropy_before is None or self.mean_entropy_after is None:
            return None
        return self.mean_entropy_after - self.mean_entropy_before


class _HostTable(NamedTuple):
    """A table as NumPy, `[V]` int64 and float64; the mean is NaN where the count is 0."""

    count: np.ndarray
    mean_entropy: np.ndarray


def _to_host(table: TokenTable) -> _HostTable:
    count, total = np.asarray(table.count, np.int64), np.asarray(table.entropy_sum, np.float64)
    if count.ndim != 1 or count.shape != total.shape:
        raise ValueError(f"a table has two arrays [V], got shapes {count.shape} and {total.shape}")
    mean = np.full(count.shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return _HostTable(count, mean)


def _text(decode: Decode | None, token: int) -> str:
    return f"<{token}>" if decode is None else decode(token)


def rows(table: TokenTable, decode: Decode | None = None, *, min_count: int = 1) -> list[TokenRow]:
    """The tokens of a table, those of the highest mean entropy first; of equal ones the lowest id first.

    Args:
      table: of arrays on any device, or of NumPy.
      decode: the text of an id. `lambda i: tokenizer.decode_rows(np.array([[i]]), np.ones((1, 1), bool))[0]` with a
        tokenizer.
      min_count: leave out tokens that were chosen less often, at least 1: the mean of few says little.

    Raises:
      ValueError: `min_count` is below 1, or the table's arrays are not of one length.
    """
    require(min_count >= 1, "min_count", min_count, "at least 1")
    count, mean = _to_host(table)
    kept = np.nonzero(count >= min_count)[0]
    order = kept[np.lexsort((kept, -mean[kept]))]
    number = int(count.sum())
    return [
        TokenRow(int(i), _text(decode, int(i)), int(count[i]), int(count[i]) / number, float(mean[i])) for i in order
    ]


def compare(
    before: TokenTable, after: TokenTable, decode: Decode | None = None, *, min_count: int = 1
) -> list[TokenChange]:
    """Two tables joined: each token that is frequent enough in one of them, by its mean entropy before, highest first.

    Tokens that the first table lacks come last, by their mean entropy after; of equal ones the lowest id first.

    Args:
      before: of the rollouts before training, or of its first steps.
      after: of those after it, of the same vocabulary.
      decode: as in `rows`.
      min_count: leave out tokens that were chosen less often in both, at least 1.

    Raises:
      ValueError: `min_count` is below 1, or the vocabularies differ in size.
    """
    require(min_count >= 1, "min_count", min_count, "at least 1")
    one, other = _to_host(before), _to_host(after)
    if one.count.shape != other.count.shape:
        raise ValueError(f"the tables have vocabularies of {one.count.size} and {other.count.size} tokens")
    kept = np.nonzero(np.maximum(one.count, other.count) >= min_count)[0]
    order = kept[np.lexsort((kept, -other.mean_entropy[kept], -one.mean_entropy[kept]))]

    def mean(table: _HostTable, token: int) -> float | None:
        return float(table.mean_entropy[token]) if table.count[token] else None

    return [
        TokenChange(i, _text(decode, i), int(one.count[i]), int(other.count[i]), mean(one, i), mean(other, i))
        for i in map(int, order)
    ]

"""Statistics over the tokens and rows of a batch, all written as sums, counts, minima and maxima.

So they are equal under any sharding, padding and order of rows (float sums up to rounding), and no tokens are sorted,
gathered or communicated. Every array comes with its bool mask; entries outside the mask are selected away before any
arithmetic, so they may hold anything, NaN included. An empty mask gives 0, or nothing selected. Values under the mask
may be infinite; NaN there has no defined order.

Order statistics find the bits of an order-preserving integer key one by one, from the highest down, by counting the
entries below a candidate. They and everything selected by them carry no gradient.
"""

from collections.abc import Callable
from fractions import Fraction
from math import isqrt
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy.base import Array, require

_INT32_MAX = 2**31 - 1
_BLOCK = 32
_INT8_MAX = 127


def _blocks(x: Array, fill: bool | int) -> Array:
    """The entries with at most `_INT8_MAX` in the last axis, padded with `fill`: their count fits int8."""
    x = jnp.atleast_1d(x)
    if x.shape[-1] <= _INT8_MAX:
        return x
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _BLOCK)], constant_values=fill)
    return padded.reshape(*x.shape[:-1], -1, _BLOCK)


def _count_blocks(mask: Array) -> Array:
    """Of `_blocks`; counting in int8 first takes a third of the time."""
    return jnp.sum(jnp.sum(mask, axis=-1, dtype=jnp.int8), dtype=jnp.int32)


def count_true(mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Number of True entries, along `axis` (all axes by default), int32."""
    return _count_blocks(_blocks(mask, False)) if axis is None else jnp.sum(mask, axis=axis, dtype=jnp.int32)


def _check(mask: Array, *arrays: Array) -> None:
    chex.assert_equal_shape([mask, *arrays])
    chex.assert_type([mask, *arrays], [bool, *[float] * len(arrays)])


# Sums and moments.


def masked_sum(x: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Σ x over the mask, along `axis` (all axes by default); `x` float, `mask` bool, of one shape."""
    _check(mask, x)
    return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def masked_mean(x: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Σ x / max(n, 1) over the n entries of the mask, along `axis` (all axes by default)."""
    return masked_sum(x, mask, axis) / jnp.maximum(count_true(mask, axis), 1).astype(x.dtype)


def _centred(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x - masked_mean(x, mask), 0)


def cross_deviation(x: Array, y: Array, mask: Array) -> Array:
    """(x - mean x)(y - mean y) on the mask, 0 elsewhere: what each entry adds to n Cov(x, y). Same shape as `x`.

    Equal values that are no dyadic fractions leave rounding noise here: gate on `is_constant` where it matters.
    """
    _check(mask, x, y)
    return _centred(x, mask) * _centred(y, mask)


def masked_covariance(x: Array, y: Array, mask: Array, *, ddof: int = 0) -> Array:
    """Σ (x - mean x)(y - mean y) / max(n - ddof, 1) over the n entries of the mask, in two passes."""
    return jnp.sum(cross_deviation(x, y, mask)) / jnp.maximum(count_true(mask) - ddof, 1).astype(x.dtype)


def masked_variance(x: Array, mask: Array, *, ddof: int = 0) -> Array:
    """Σ (x - mean x)² / max(n - ddof, 1) over the n entries of the mask, in two passes."""
    return masked_covariance(x, x, mask, ddof=ddof)


def is_constant(x: Array, mask: Array) -> Array:
    """Whether all entries under the mask are equal, exactly; True for none. Bool scalar."""
    _check(mask, x)
    return jnp.max(x, where=mask, initial=-jnp.inf) <= jnp.min(x, where=mask, initial=jnp.inf)


def whiten(x: Array, mask: Array) -> Array:
    """(x - mean) / sqrt(var + 1e-8) on the mask, 0 elsewhere; var with ddof 1. Same shape as `x`.

    Equal entries give exactly 0, and so do fewer than two.
    """
    scaled = _centred(x, mask) * jax.lax.rsqrt(masked_variance(x, mask, ddof=1) + 1e-8)
    return jnp.where(is_constant(x, mask), 0, scaled)


def whiten_rows(x: Array, mask: Array) -> Array:
    """`whiten` in which every row weighs the same, and so do the entries of one row; `x`, `mask`: `[B, T]`.

    With m_i the mean over the entries of row i: mean = Σ m_i(x) / n and var = Σ m_i((x - mean)²) / (n - 1) over the n
    rows that have entries. Equal entries give exactly 0, and so does a single row.
    """
    chex.assert_rank([x, mask], 2)
    used = jnp.any(mask, axis=1)
    deviation = jnp.where(mask, x - masked_mean(masked_mean(x, mask, axis=1), used), 0)
    total = masked_sum(masked_mean(jnp.square(deviation), mask, axis=1), used)
    variance = total / jnp.maximum(count_true(used) - 1, 1).astype(x.dtype)
    none = is_constant(x, mask) | (count_true(used) < 2)
    return jnp.where(none, 0, deviation * jax.lax.rsqrt(variance + 1e-8))


def reward_to_go(reward: Array, mask: Array, gamma: Array) -> Array:
    """R_t = r_t + γ R_s, with s the next column of the mask in the row; `[B, T]`, 0 outside the mask.

    Columns outside the mask are skipped: their reward does not count and they discount nothing, so a hole in a response
    does not cut it.

    Args:
      reward: `[B, T]` float.
      mask: `[B, T]` bool.
      gamma: γ, float scalar.
    """
    chex.assert_rank([reward, mask, gamma], [2, 2, 0])
    _check(mask, reward)

    def step(later: Array, column: tuple[Array, Array]) -> tuple[Array, Array]:
        r, used = column
        now = jnp.where(used, r + gamma.astype(r.dtype) * later, later)
        return now, jnp.where(used, now, 0)

    _, returns = jax.lax.scan(step, jnp.zeros_like(reward[:, 0]), (reward.T, mask.T), reverse=True)
    return returns.T


# Order statistics.


def order_keys(x: Array) -> Array:
    """Signed integers of the width of `x`: x < y exactly if key(x) < key(y), and -0.0 has the key of 0.0."""
    chex.assert_type(x, float)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"int{jnp.finfo(x.dtype).bits}"))
    info = jnp.iinfo(bits.dtype)
    bits = jnp.where(bits == info.min, 0, bits)
    return jnp.where(bits < 0, bits ^ info.max, bits)


def _value_of_key(key: Array, dtype: jnp.dtype) -> Array:
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ jnp.iinfo(key.dtype).max, key), dtype)


def _largest_key(count_below: Callable[[Array], Array], rank: Array, start: Array, num_bits: int) -> Array:
    """The largest key from `start` on with at most `rank` entries below it, found bit by bit."""
    one = jnp.ones_like(start)

    def refine(i: Array, prefix: Array) -> Array:
        candidate = prefix ^ (one << jnp.asarray(num_bits - 1 - i, start.dtype))
        return jnp.where(count_below(candidate) <= rank, candidate, prefix)

    return jax.lax.fori_loop(0, num_bits, refine, start)


def _key_at_rank(keys: Array, mask: Array, rank: Array) -> Array:
    """The key at `rank` among those of the mask, for 0 <= rank < n; the least there is for a negative rank."""
    info = jnp.iinfo(keys.dtype)
    blocks = _blocks(jnp.where(mask, keys, info.max), info.max)
    start = jnp.asarray(info.min, keys.dtype)
    return _largest_key(lambda key: _count_blocks(blocks < key), rank, start, info.bits)


def order_statistic(x: Array, mask: Array, rank: Array) -> Array:
    """The value at `rank` among the n entries of the mask in ascending order, exactly (0 for an empty mask).

    Args:
      x: float, any shape; `jax.vmap` gives one statistic per row.
      mask: bool, same shape.
      rank: int32 scalar, 0 for the smallest; clipped to [0, n - 1].
    """
    _check(mask, x)
    count = count_true(mask)
    rank = jnp.clip(rank, 0, jnp.maximum(count - 1, 0))
    key = _key_at_rank(order_keys(x), mask, rank)
    return jnp.where(count > 0, _value_of_key(key, x.dtype), 0)


def quantile(x: Array, mask: Array, q: Array) -> Array:
    """The q-quantile of the entries under the mask, by linear interpolation at position (n - 1) q.

    The rule of `numpy.quantile` and `torch.quantile`, except that a position within the rounding of q is that integer,
    so 0.8 in float32 and in float64 names the same one of 11 entries, and that next to an infinite entry the result
    is infinite and not NaN (but there is no value between -inf and inf).

    Args:
      x: float, any shape; `jax.vmap` gives one quantile per row.
      mask: bool, same shape.
      q: float scalar, clipped to [0, 1].
    """
    _check(mask, x)
    chex.assert_rank(q, 0)
    position = jnp.clip(q, 0, 1) * jnp.maximum(count_true(mask) - 1, 0).astype(q.dtype)
    nearest = jnp.round(position)
    slack = position * (1.5 * float(jnp.finfo(q.dtype).eps))
    position = jnp.where(jnp.abs(position - nearest) <= slack, nearest, position)
    ranks = jnp.stack([jnp.floor(position), jnp.ceil(position)]).astype(jnp.int32)
    low, high = jax.vmap(order_statistic, (None, None, 0))(x, mask, ranks)
    weight = (position - jnp.floor(position)).astype(x.dtype)
    return jnp.where(low == high, low, jnp.clip(low * (1 - weight) + high * weight, low, high))


# Selections of an exact number of entries.


def _split_at(keys: Array, mask: Array, k: Array) -> tuple[Array, Array]:
    """The entries that are certainly among the k lowest, and those tied for the places left."""
    bound = _key_at_rank(keys, mask, k - 1)
    return mask & (keys < bound), mask & (keys == bound)


def top_k_mask(x: Array, mask: Array, k: Array, row_id: Array) -> Array:
    """The min(k, n) largest of the n entries under the mask; ties go to the lowest `(row_id, column)`.

    Three selections by counting: of values, of rows among equal values, of columns in the one row that is cut.

    Args:
      x: `[B, T]` float.
      mask: `[B, T]` bool.
      k: int32 scalar, number of entries; nothing is selected for k <= 0.
      row_id: `[B]` int32, unique and not negative, in any order.

    Returns:
      `[B, T]` bool, a subset of `mask`.
    """
    chex.assert_rank([x, mask, row_id], [2, 2, 1])
    _check(mask, x)
    k = jnp.clip(k, 0, count_true(mask))
    above, ties = _split_at(~order_keys(x), mask, k)
    places, tied = k - count_true(above), count_true(ties, 1)

    def tied_before(row: Array) -> Array:
        return jnp.sum(jnp.where(row_id < row, tied, 0), dtype=jnp.int32)

    cut = _largest_key(tied_before, places - 1, jnp.zeros_like(row_id, shape=()), 31)
    columns = jnp.any(ties & (row_id == cut)[:, None], axis=0)
    columns &= jnp.cumsum(columns, dtype=jnp.int32) <= places - tied_before(cut)
    return above | (ties & ((row_id < cut)[:, None] | ((row_id == cut)[:, None] & columns[None, :])))


def row_top_k_mask(x: Array, mask: Array, k: Array) -> Array:
    """In every row the min(k, n) largest of its n entries under the mask; ties go to the lowest column.

    Args:
      x: `[B, T]` float.
      mask: `[B, T]` bool.
      k: `[B]` int32, number of entries of each row; nothing is selected for k <= 0.

    Returns:
      `[B, T]` bool, a subset of `mask`.
    """
    chex.assert_rank([x, mask, k], [2, 2, 1])
    _check(mask, x)
    k = jnp.clip(k, 0, count_true(mask, 1))
    above, ties = jax.vmap(_split_at)(~order_keys(x), mask, k)
    places = k - count_true(above, 1)
    return above | (ties & (jnp.cumsum(ties, axis=1, dtype=jnp.int32) <= places[:, None]))


def row_uniform(key: Array, row_id: Array, num_columns: int) -> Array:
    """Uniform float32 draws in [0, 1), `[B, num_columns]`; key: consumed.

    Row b is a one-dimensional draw of `fold_in(key, row_id[b])`: the order of rows, padding rows and padding columns
    change no draw (with jax's default, partitionable threefry).
    """
    chex.assert_rank(row_id, 1)
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (num_columns,), jnp.float32))(row_id)


def random_mask(key: Array, row_id: Array, candidates: Array, k: Array) -> Array:
    """min(k, n) of the n candidates, uniformly without replacement; key: consumed.

    Args and result as `top_k_mask`; the draws are those of `row_uniform`.
    """
    chex.assert_rank([row_id, candidates], [1, 2])
    return top_k_mask(row_uniform(key, row_id, candidates.shape[1]), candidates, k, row_id)


class FractionParts(NamedTuple):
    """A fraction in [0, 1] as two int32 scalars; numerator · (denominator - 1) fits int32."""

    numerator: Array
    denominator: Array


def fraction_parts(fraction: float) -> FractionParts:
    """The fraction that the shortest decimal form of `fraction` names, 0.29 as 29/100.

    Decimals of up to four digits are exact, and small ones of more (1e-8 as 1/10⁸); any other becomes the closest
    fraction that keeps the products of `fraction_of` below 2³¹.

    Raises:
      ValueError: `fraction` is outside [0, 1].
    """
    require(0.0 <= fraction <= 1.0, "fraction", fraction, "in [0, 1]")
    exact = Fraction(str(float(fraction)))
    limit = min(isqrt(int(_INT32_MAX / exact)), _INT32_MAX) if exact else 1
    parts = exact.limit_denominator(limit)
    return FractionParts(jnp.asarray(parts.numerator, jnp.int32), jnp.asarray(parts.denominator, jnp.int32))


def fraction_divmod(count: Array, parts: FractionParts) -> tuple[Array, Array]:
    """⌊fraction · count⌋ and the remainder over the denominator, in int32 arithmetic, exact; count: int32, >= 0.

    fraction · count = floor + remainder / denominator, 0 <= remainder < denominator, for the fraction that `parts`
    holds. Float arithmetic is off by one at times: int(0.29 * 100) is 28.
    """
    numerator, denominator = parts
    rest = (count % denominator) * numerator
    return (count // denominator) * numerator + rest // denominator, rest % denominator


def fraction_of(count: Array, parts: FractionParts) -> Array:
    """⌊fraction · count⌋, exactly; see `fraction_divmod`."""
    return fraction_divmod(count, parts)[0]


# Statistics of groups, for each row, valid or not, those of its own group. Ids lie in [0, B), rows in any order.


def _check_group(group: Array, valid: Array, *x: Array) -> None:
    chex.assert_rank([group, valid], 1)
    chex.assert_type(group, int)
    _check(valid, *x)
    chex.assert_equal_shape([group, valid])


def group_count(group: Array, valid: Array) -> Array:
    """Number of valid rows in each row's group, `[B]` int32; `group`: `[B]` int32, `valid`: `[B]` bool."""
    _check_group(group, valid)
    return jax.ops.segment_sum(valid.astype(jnp.int32), group, num_segments=group.size)[group]


def group_sum(x: Array, group: Array, valid: Array) -> Array:
    """Σ x over the valid rows of each row's group, `[B]`."""
    _check_group(group, valid, x)
    return jax.ops.segment_sum(jnp.where(valid, x, 0), group, num_segments=group.size)[group]


def group_mean(x: Array, group: Array, valid: Array) -> Array:
    """Mean of x over the valid rows of each row's group, `[B]`; 0 for a group without one."""
    return group_sum(x, group, valid) / jnp.maximum(group_count(group, valid), 1).astype(x.dtype)


def group_std(x: Array, group: Array, valid: Array, *, ddof: int = 1) -> Array:
    """sqrt(Σ (x - mean)² / max(n - ddof, 1)) over the n valid rows of each row's group, `[B]`, in two passes.

    0 for a group of one valid row. Equal values may leave rounding noise: gate on `group_is_constant`.
    """
    deviation = jnp.where(valid, x - group_mean(x, group, valid), 0)
    denominator = jnp.maximum(group_count(group, valid) - ddof, 1).astype(x.dtype)
    return jnp.sqrt(group_sum(jnp.square(deviation), group, valid) / denominator)


def group_is_constant(x: Array, group: Array, valid: Array) -> Array:
    """Whether x is equal, exactly, over the valid rows of each row's group, `[B]` bool; True for one row or none."""
    _check_group(group, valid, x)
    high = jax.ops.segment_max(jnp.where(valid, x, -jnp.inf), group, num_segments=group.size)
    low = jax.ops.segment_min(jnp.where(valid, x, jnp.inf), group, num_segments=group.size)
    return (high <= low)[group]


def group_order_statistic(x: Array, group: Array, valid: Array, rank: Array) -> Array:
    """The value at `rank` among the valid rows of each row's group in ascending order, exactly, `[B]`.

    By counting, for every row, the rows of its group below it and up to it: `[B, B]` comparisons. 0 for a group without
    a valid row.

    Args:
      x: `[B]` float.
      group: `[B]` int32.
      valid: `[B]` bool.
      rank: `[B]` int32, equal in all rows of a group, 0 for the smallest; clipped to [0, n - 1] with n valid rows.
    """
    _check_group(group, valid, x)
    count = group_count(group, valid)
    rank = jnp.clip(rank, 0, jnp.maximum(count - 1, 0))
    peer = valid[None, :] & (group[None, :] == group[:, None])
    below, up_to = (count_true(peer & found, 1) for found in (x[None, :] < x[:, None], x[None, :] <= x[:, None]))
    holds = valid & (below <= rank) & (rank < up_to)
    value = jax.ops.segment_max(jnp.where(holds, x, -jnp.inf), group, num_segments=group.size)[group]
    return jnp.where(count > 0, value, 0)

"""Statistics over forked rollouts: values of states, anchors to fork at, blocks between them.

A row was drawn from a *state*: rows of one `Rollouts.group` from the same one. The state of a root is its prompt; that
of any other row is what its parent, a row by `row_id`, held before column `fork`. Groups with one parent and different
forks are states along one base trajectory, and before the first of them stands the state of the parent itself.
"""

import chex
import jax
import jax.numpy as jnp

from jentropy import stats
from jentropy.base import Array, Rollouts, require


def prefix_values(value: Array, group: Array, valid: Array) -> Array:
    """The Monte-Carlo value of each row's state: the mean over the valid rows drawn from it, `[B]`.

    0 for a state without a valid row: see `is_estimated`.

    Args:
      value: `[B]` float, what each row earned; entries of rows that are not valid are ignored.
      group: `[B]` int32.
      valid: `[B]` bool.
    """
    return stats.group_mean(value, group, valid)


def is_estimated(group: Array, valid: Array) -> Array:
    """Whether each row's state has a valid row, `[B]` bool: K = 0 rows say nothing about its value."""
    return stats.group_count(group, valid) > 0


def state_leads(rollouts: Rollouts, valid: Array) -> Array:
    """One valid row of each state that has any, that of the lowest `row_id`: `[B]` bool, for sums over states."""
    lower = rollouts.row_id[None, :] < rollouts.row_id[:, None]
    peer = valid[None, :] & (rollouts.group[None, :] == rollouts.group[:, None])
    return valid & ~jnp.any(peer & lower, axis=1)


def _parent_index(rollouts: Rollouts) -> tuple[Array, Array]:
    """Where each row's parent stands, `[B]` int32, and whether it is among the rows, `[B]` bool."""
    match = (rollouts.row_id[None, :] == rollouts.parent[:, None]) & (rollouts.parent >= 0)[:, None]
    return jax.lax.argmax(match, 1, jnp.int32), jnp.any(match, axis=1)


def previous_value(value: Array, rollouts: Rollouts, valid: Array) -> tuple[Array, Array]:
    """The value of the state before each row's own on the same base trajectory, `[B]`, and whether there is one.

    That is the state of the same parent with the next smaller fork and a valid row; where the row's fork is the first,
    the parent's own state. There is none for roots, and none where the parent is not among the rows or no valid row was
    drawn from its state: the value is 0 then. Of two groups with one parent and one fork, which should not be, the one
    with the lowest `row_id` counts.

    Args:
      value: `[B]` float, equal within a group, as of `prefix_values`.
      rollouts: the rows of one rollout.
      valid: `[B]` bool.

    Returns:
      `[B]` float and `[B]` bool.
    """
    chex.assert_rank([value, valid], 1)
    chex.assert_equal_shape([value, valid, rollouts.group])
    parent, fork, row_id = rollouts.parent, rollouts.fork, rollouts.row_id
    earlier = valid[None, :] & (parent[None, :] == parent[:, None]) & (parent >= 0)[:, None]
    earlier &= fork[None, :] < fork[:, None]
    nearest = jnp.max(fork[None, :], axis=1, where=earlier, initial=jnp.iinfo(fork.dtype).min)
    at = earlier & (fork[None, :] == nearest[:, None])
    sibling = jax.lax.argmin(jnp.where(at, row_id[None, :], jnp.iinfo(row_id.dtype).max), 1, jnp.int32)
    has_sibling, (above, has_parent) = jnp.any(at, axis=1), _parent_index(rollouts)
    known = has_sibling | (has_parent & is_estimated(rollouts.group, valid)[above])
    return jnp.where(known, value[jnp.where(has_sibling, sibling, above)], 0), known


def root_group(rollouts: Rollouts) -> Array:
    """The group of the root that each row comes from, over any number of forks, `[B]` int32: one id for a whole tree.

    A row whose parent is not among the rows is a root.
    """
    parent, found = _parent_index(rollouts)
    above = jnp.where(found, parent, jnp.arange(parent.size, dtype=parent.dtype))
    for _ in range((parent.size - 1).bit_length()):
        above = above[above]
    return rollouts.group[above]


# Within one response. Leading axes are free: `[T]` or `[B, T]`.


def _column(like: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, like.shape, like.ndim - 1)


def select_anchors(
    score: Array, mask: Array, num: int, *, min_gap: int = 1, exclude_last: int = 0
) -> tuple[Array, Array]:
    """The columns to fork at: those of the highest scores under the mask, one after the other, `min_gap` apart.

    Ties go to the lowest column. A column within less than `min_gap` of one that was taken is no longer a candidate, so
    there may be fewer anchors than `num`, as there are where the mask has fewer entries. NaN is never selected.
    A fork at the first column of a response leads back to its prompt: leave that column out of the mask.

    Args:
      score: `[T]` or `[B, T]` float, such as the entropy of each token.
      mask: same shape, bool.
      num: number of anchors K, at least 1.
      min_gap: least difference of two columns, at least 1.
      exclude_last: how many of the last entries of the mask are no candidates, not negative.

    Returns:
      Columns, `[K]` or `[B, K]` int32, ascending, T where there is none; and which of them there are, bool.

    Raises:
      ValueError: a number is out of range.

    >>> columns, valid = select_anchors(jnp.asarray([0.1, 0.9, 0.8, 0.3]), jnp.ones(4, bool), 2, min_gap=2)
    >>> columns.tolist(), valid.tolist()
    ([1, 3], [True, True])
    """
    require(num >= 1, "num", num, "at least 1")
    require(min_gap >= 1, "min_gap", min_gap, "at least 1")
    require(exclude_last >= 0, "exclude_last", exclude_last, "not negative")
    chex.assert_equal_shape([score, mask])
    chex.assert_type([score, mask], [float, bool])
    length, column = score.shape[-1], _column(score)
    left = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1, dtype=jnp.int32), -1)
    keys = stats.order_keys(score)
    lowest = jnp.iinfo(keys.dtype).min  # below the key of -inf

    def take(candidates: Array, _: None) -> tuple[Array, Array]:
        best = jax.lax.argmax(jnp.where(candidates, keys, lowest), score.ndim - 1, jnp.int32)
        near = jnp.abs(column - best[..., None]) < min_gap
        return candidates & ~near, jnp.where(jnp.any(candidates, axis=-1), best, length)

    _, columns = jax.lax.scan(take, mask & (left > exclude_last) & ~jnp.isnan(score), None, length=num)
    columns = jnp.sort(jnp.moveaxis(columns, 0, -1), axis=-1)
    return columns, columns < length


def partition(columns: Array, valid: Array, mask: Array) -> Array:
    """The block of each token: how many anchors stand at or before its column; -1 outside the mask.

    An anchor begins a block, so the prefix that is kept at a fork ends before it.

    Args:
      columns, valid: `[K]` or `[B, K]`, as of `select_anchors`.
      mask: `[T]` or `[B, T]` bool.

    Returns:
      `[T]` or `[B, T]` int32, 0..K on the mask.
    """
    chex.assert_equal_rank([columns, valid, mask])
    passed = valid[..., :, None] & (columns[..., :, None] <= _column(mask)[..., None, :])
    return jnp.where(mask, stats.count_true(passed, axis=-2), -1)


def last_known(value: Array, known: Array) -> Array:
    """The value at the last known column up to each one; 0 before the first. Same shape as `value`.

    Args:
      value: `[T]` or `[B, T]`; entries that are not known are ignored.
      known: same shape, bool.
    """
    chex.assert_equal_shape([value, known])
    last = jax.lax.cummax(jnp.where(known, _column(known), -1), axis=known.ndim - 1)
    found = jnp.take_along_axis(value, jnp.maximum(last, 0), axis=-1)
    return jnp.where(last >= 0, found, 0)

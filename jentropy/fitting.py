"""How second models learn: rows cut into mini-batches, gradients that are sums over rows, steps of an optimizer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import chex
import jax
import jax.numpy as jnp

from jentropy import outcome, stats
from jentropy.base import Array, Metrics, Rollouts, require

Weigh: TypeAlias = Callable[[Rollouts], Array]
"""A mini-batch -> `[M, ...]`: the weight of each row or token, with the denominator of the whole mini-batch inside."""

Loss: TypeAlias = Callable[[Any, Rollouts, Array], tuple[Array, Metrics]]
"""(params, rows, weight) -> (scalar, metrics as `(sum, count)`): sums over rows, so that rows may come in pieces."""


class Optimizer(Protocol):
    """What is used of `optax.GradientTransformation`."""

    @property
    def init(self) -> Callable[[Any], Any]:
        """`params -> state`."""
        ...

    @property
    def update(self) -> Callable[..., tuple[Any, Any]]:
        """`(gradient, state, params) -> (what is added to the parameters, state)`."""
        ...


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often and in how many pieces the rows of a rollout are used.

    Attributes:
      num_epochs: passes over the rows, at least 1.
      num_minibatches: optimizer updates of a pass, at least 1.
      num_microbatches: pieces of a mini-batch whose gradients are summed, at least 1: for memory, changes no result.
    """

    num_epochs: int = 1
    num_minibatches: int = 1
    num_microbatches: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(isinstance(value, int) and value >= 1, field.name, value, "a whole number of at least 1")


class Fitted(NamedTuple):
    """Parameters and the optimizer's state."""

    params: Any
    opt_state: Any


def start(optimizer: Optimizer, params: Any) -> Fitted:
    """The parameters and the optimizer's first state."""
    with jax.numpy_dtype_promotion("standard"):  # optax's own code needs it
        return Fitted(params, optimizer.init(params))


def needed(data: Mapping[str, Array], name: str, owner: str, kind: str = "token_data") -> Array:
    """`data[name]`, or a `ValueError` that names what `owner` needs."""
    if name not in data:
        raise ValueError(f"{owner} needs {kind}[{name!r}], got {sorted(data)}")
    return data[name]


def used_tokens(rollouts: Rollouts) -> Array:
    """The response tokens of valid rows, `[B, T]` bool."""
    return rollouts.loss_mask & outcome.valid_rows(rollouts)[:, None]


def in_pieces(function: Callable[[Array], Array], x: Array, num: int) -> Array:
    """`function(x)` for a function of rows, applied to `num` pieces of the rows one after the other.

    Args:
      function: `[b, ...] -> [b, ...]`, never mixes rows.
      x: `[B, ...]`; B need not divide.
      num: number of pieces.
    """
    if num == 1:
        return function(x)
    num_rows = x.shape[0]
    x = jnp.pad(x, [(0, -num_rows % num)] + [(0, 0)] * (x.ndim - 1))
    pieces = jax.lax.map(function, x.reshape(-1, num, *x.shape[1:]).swapaxes(0, 1))
    return pieces.swapaxes(0, 1).reshape(x.shape[0], *pieces.shape[2:])[:num_rows]


def minibatches(key: Array, row_id: Array, used: Array, num: int, multiple: int = 1) -> Array:
    """The used rows in a random order, dealt out in turn: `[num, M]` int32 indices of rows, B in an empty place.

    Sizes differ by at most one. The order is that of draws of `fold_in(key, row_id)`, so the order of rows, and rows
    that are not used, change nothing but the number of empty places. key: consumed.

    Args:
      key: a PRNG key.
      row_id: `[B]` int32, unique.
      used: `[B]` bool.
      num: number of mini-batches.
      multiple: M is a multiple of it.
    """
    chex.assert_rank([row_id, used], 1)
    num_rows = row_id.size
    size = -(-num_rows // (num * multiple)) * multiple
    draw = stats.row_uniform(key, row_id, 1)[:, 0]
    first = (draw[None, :] < draw[:, None]) | ((draw[None, :] == draw[:, None]) & (row_id[None, :] < row_id[:, None]))
    rank = stats.count_true(first & used[None, :], 1)
    place = jnp.where(used, (rank % num) * size + rank // num, num * size)
    index = jnp.full((num * size,), num_rows, jnp.int32)
    return index.at[place].set(jnp.arange(num_rows, dtype=jnp.int32), mode="drop").reshape(num, size)


def _take(rollouts: Rollouts, index: Array) -> Rollouts:
    """Rows by index; in an empty place a row without response tokens."""
    present = index < rollouts.row_id.size
    rows = jax.tree.map(lambda x: x[jnp.where(present, index, 0)], rollouts)
    return rows.replace(loss_mask=rows.loss_mask & present[:, None])


def _gradient(loss: Loss, params: Any, rows: Rollouts, weight: Array, num: int) -> Any:
    """`((value, metrics), gradient)`, summed over `num` pieces of the rows."""

    def one(piece: tuple[Rollouts, Array]) -> Any:
        return jax.value_and_grad(loss, has_aux=True)(params, *piece)

    if num == 1:
        return one((rows, weight))
    pieces = jax.tree.map(lambda x: x.reshape(-1, num, *x.shape[1:]).swapaxes(0, 1), (rows, weight))
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    )
    total, _ = jax.lax.scan(lambda t, piece: (jax.tree.map(jnp.add, t, one(piece)), None), zero, pieces)
    return total


def _norm(tree: Any) -> Array:
    """The Euclidean norm over all leaves, in float32 at least."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack([x.astype(jnp.result_type(float)) for x in squares])))


def fit(
    loss: Loss, weigh: Weigh, optimizer: Optimizer, passes: Passes, fitted: Fitted, rollouts: Rollouts, key: Array
) -> tuple[Fitted, Metrics]:
    """Fits to the response tokens of valid rows; a row without one is in no mini-batch.

    An update without a row, or whose loss or gradient is not finite, keeps parameters and optimizer as they are: a zero
    gradient would still move them. key: consumed.

    Args:
      loss: see `Loss`; it reads `rows.loss_mask`.
      weigh: see `Weigh`.
      optimizer: see `Optimizer`.
      passes: epochs, mini-batches and micro-batches.
      fitted: what to start from.
      rollouts: the rows of one rollout.
      key: a PRNG key.

    Returns:
      The new `Fitted`, and the metrics of `loss` with `loss`, `grad_norm` (means over the updates that were made) and
      `skipped` (over the updates that had rows).
    """
    used = used_tokens(rollouts)
    rollouts = rollouts.replace(loss_mask=used)
    keys = jax.random.split(key, passes.num_epochs)
    rows, num, multiple = jnp.any(used, axis=1), passes.num_minibatches, passes.num_microbatches
    index = jax.vmap(lambda key: minibatches(key, rollouts.row_id, rows, num, multiple))(keys)

    def update(now: Fitted, index: Array) -> tuple[Fitted, Metrics]:
        rows = _take(rollouts, index)
        (value, metrics), gradient = _gradient(loss, now.params, rows, weigh(rows), passes.num_microbatches)
        norm, some = _norm(gradient), jnp.any(rows.loss_mask)
        ok = some & jnp.isfinite(value) & jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):
            change, opt_state = optimizer.update(gradient, now.opt_state, now.params)
        params = jax.tree.map(lambda x, dx: x + dx.astype(x.dtype), now.params, change)
        new = jax.tree.map(lambda x, old: jnp.where(ok, x, old), Fitted(params, opt_state), now)
        count = ok.astype(value.dtype)
        own = {
            "loss": (jnp.where(ok, value, 0.0), count),
            "grad_norm": (jnp.where(ok, norm.astype(value.dtype), 0.0), count),
            "skipped": ((some & ~ok).astype(value.dtype), some.astype(value.dtype)),
        }
        return new, {**metrics, **own}

    fitted, metrics = jax.lax.scan(update, fitted, index.reshape(-1, index.shape[-1]))
    return fitted, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)

"""A linear head with its vocabulary cut into chunks, and the running sums over them: what `head` is made of.

Chunk i holds the ids v with `v % num_chunks == i`. With such strided chunks an unembedding whose vocabulary is sharded
is never gathered: every device works on its own ids of each chunk, and only per-row statistics and `[N, D]` gradients
are reduced. This is plain global-view code and names no mesh axis; inside `jax.shard_map` it needs `check_vma=False`
(a custom rule does not follow which arrays vary over the mesh).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy.base import Array, require
from jentropy.features import LOG_ZERO, statistic_dtype


def default_num_chunks(num_rows: int, vocab_size: int, *, chunk_size: int = 4096) -> int:
    """Cuts V into chunks of at most `chunk_size` ids, preferring a divisor of V (no padding) down to a quarter of it.

    Args:
      num_rows: N; a call whose logits are small altogether (N · V <= 2^20) is one chunk.
      vocab_size: V.
      chunk_size: largest number of ids in a chunk.
    """
    smallest = -(-vocab_size // chunk_size)
    if smallest == 1 or num_rows * vocab_size <= 2**20:
        return 1
    candidates = range(smallest, 4 * vocab_size // chunk_size + 1)
    return next((c for c in candidates if vocab_size % c == 0), smallest)


class Head(NamedTuple):
    """One linear head: rows flattened to N, the vocabulary cut into C chunks and padded to a multiple of C."""

    hidden: Array  # [N, D]
    unembed: Array  # [V / C, C, D]
    bias: Array | None  # [V / C, C]
    temperature: Array  # [N], in the dtype of statistics
    legal: Array | None  # [V / C, C] bool, None if every id is legal

    @property
    def num_chunks(self) -> int:
        return self.unembed.shape[1]

    def weights(self, i: Array | int) -> Array:
        """The unembedding of chunk i, `[V / C, D]`, in the dtype of the products."""
        return _chunk(self.unembed, i).astype(self.hidden.dtype)

    def logits(self, i: Array | int) -> Array:
        """z of chunk i, `[N, V / C]`; `LOG_ZERO` for illegal ids."""
        z = _dot(self.hidden, self.weights(i), 1, 1)
        if self.bias is not None:
            z += _chunk(self.bias, i).astype(z.dtype)[None, :]
        z /= self.temperature[:, None]
        return z if self.legal is None else jnp.where(_chunk(self.legal, i)[None, :], z, LOG_ZERO)

    def hits(self, tokens: Array, i: Array | int) -> Array:
        """Which id of chunk i is the row's token, `[N, V / C]` bool."""
        ids = jnp.arange(self.unembed.shape[0], dtype=tokens.dtype) * self.num_chunks + i
        return tokens[:, None] == ids[None, :]

    def no_gradient(self) -> "Gradient":
        """What `add_gradient` starts from."""
        hidden = jnp.zeros_like(self.hidden, self.temperature.dtype)
        bias = None if self.bias is None else jnp.zeros_like(self.bias)
        return Gradient(hidden, jnp.zeros_like(self.unembed), bias)

    def add_gradient(self, gradient: "Gradient", dz: Array, i: Array | int) -> "Gradient":
        """Adds what `dz`, the gradient of chunk i's logits, sends to the arrays."""
        dz = dz / self.temperature[:, None]
        if self.legal is not None:
            dz = jnp.where(_chunk(self.legal, i)[None, :], dz, 0.0)
        rounded = dz.astype(self.hidden.dtype)
        hidden = gradient.hidden + _dot(rounded, self.weights(i), 1, 0)
        unembed = _set_chunk(gradient.unembed, _dot(rounded, self.hidden, 0, 0), i)
        bias = None if gradient.bias is None else _set_chunk(gradient.bias, dz.sum(0), i)
        return Gradient(hidden, unembed, bias)

    def cotangent(self, gradient: "Gradient") -> "Head":
        """The finished gradient in this head's structure and dtypes; None (no gradient) for temperature and mask."""
        hidden = gradient.hidden.astype(self.hidden.dtype)
        return self._replace(hidden=hidden, unembed=gradient.unembed, bias=gradient.bias, temperature=None, legal=None)


class Gradient(NamedTuple):
    """The gradient of a head while the chunks are swept: shapes of `Head`, `hidden` in the dtype of statistics."""

    hidden: Array
    unembed: Array
    bias: Array | None


def make_head(
    hidden: Array,
    unembed: Array,
    bias: Array | None,
    temperature: Array | float,
    vocab_mask: Array | None,
    num_chunks: int,
) -> Head:
    """Flattens the rows and cuts the vocabulary of a head.

    Args:
      hidden: `[..., D]` float.
      unembed: `[V, D]` float.
      bias: optional `[V]` float.
      temperature: scalar or `[...]`, above 0; carries no gradient.
      vocab_mask: optional `[V]` bool, False for ids of probability 0.
      num_chunks: C, in [1, V]; V is padded to a multiple of it, with ids that are not legal.

    Raises:
      ValueError: `num_chunks` is out of range.
    """
    vocab_size = unembed.shape[0]
    require(1 <= num_chunks <= vocab_size, "num_chunks", num_chunks, f"in [1, {vocab_size}]")
    chex.assert_type([hidden, unembed], float)
    chex.assert_shape(unembed, (None, hidden.shape[-1]))
    if vocab_mask is None and vocab_size % num_chunks:
        vocab_mask = jnp.ones(vocab_size, bool)
    chex.assert_shape([x for x in (bias, vocab_mask) if x is not None], (vocab_size,))

    def cut(x: Array | None) -> Array | None:
        return None if x is None else _cut(x, num_chunks)

    rows = hidden.shape[:-1]
    scale = jax.lax.stop_gradient(jnp.asarray(temperature, statistic_dtype(hidden.dtype)))
    scale = jnp.broadcast_to(scale, rows).reshape(-1)
    return Head(hidden.reshape(scale.size, -1), _cut(unembed, num_chunks), cut(bias), scale, cut(vocab_mask))


def _cut(x: Array, num_chunks: int) -> Array:
    """`[V, ...]` -> `[V / C, C, ...]`, padded with zeros."""
    if x.shape[0] % num_chunks:
        x = jnp.pad(x, [(0, -x.shape[0] % num_chunks)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, num_chunks, *x.shape[1:])


def _chunk(x: Array, i: Array | int) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)


def _set_chunk(x: Array, values: Array, i: Array | int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, values.astype(x.dtype), i, axis=1)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Contracts one axis of each matrix, accumulated in the dtype of statistics."""
    return jax.lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=None if a.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST,
        preferred_element_type=statistic_dtype(a.dtype),
    )


def sweep(step: Callable[[Any, Array | int], Any], init: Any, num_chunks: int) -> Any:
    """Folds `step(carry, i)` over the chunks; a single chunk is straight code."""
    if num_chunks == 1:
        return step(init, 0)
    return jax.lax.scan(lambda carry, i: (step(carry, i), None), init, jnp.arange(num_chunks, dtype=jnp.int32))[0]


class Moments(NamedTuple):
    """What a sweep keeps of each row, `[N]`: `shift = max z`, `total = Σ e^x`, `first = Σ x e^x` with x = z - shift."""

    shift: Array
    total: Array
    first: Array

    @classmethod
    def of(cls, z: Array) -> "Moments":
        shift = z.max(1)
        x = z - shift[:, None]
        weight = jnp.exp(x)
        return cls(shift, weight.sum(1), (weight * x).sum(1))

    @classmethod
    def empty(cls, like: Array) -> "Moments":
        return cls(jnp.full_like(like, LOG_ZERO), jnp.zeros_like(like), jnp.zeros_like(like))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of the union of two sets of ids; illegal ids vanish beside a legal one."""
        shift = jnp.maximum(self.shift, other.shift)
        a, b = self.shift - shift, other.shift - shift
        ra, rb = jnp.exp(a), jnp.exp(b)
        first = ra * (self.first + self.total * a) + rb * (other.first + other.total * b)
        return Moments(shift, ra * self.total + rb * other.total, first)

    def probability(self, z: Array) -> Array:
        return jnp.exp(z - self.shift[:, None]) / self.total[:, None]

    def log_probability(self, z: Array) -> Array:
        return (z - self.shift[:, None]) - jnp.log(self.total)[:, None]

    def centred(self, z: Array) -> Array:
        """log p + H = x - first / total, without the cancellation of log p and H for a nearly uniform p."""
        return (z - self.shift[:, None]) - (self.first / self.total)[:, None]

    def entropy(self) -> Array:
        entropy = jnp.maximum(jnp.log(self.total) - self.first / self.total, 0.0)
        return jnp.where(self.shift > LOG_ZERO, entropy, 0.0)

"""Nucleus entropies of a linear head: the entropy of the most probable ids that hold a given mass, no `[N, V]` array.

The forward pass cuts the rows into blocks. A block has its logits for the whole vocabulary at once, so they are
computed a single time, and the nucleus is found on them by bisection (`features.find_nucleus`). The backward pass cuts
the vocabulary into chunks, as `head` does, and computes the logits again. What is kept in between is the inputs and a
few numbers per row: the bounds of each nucleus lie between neighbouring probabilities, so that logits computed again,
with other rounding, name the same ids. Precision is that of `head`. Under a mesh the rows of a block come from all
devices and each device works on its own ids: sums over the vocabulary are what is communicated.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy.base import Array, require
from jentropy.features import LOG_ZERO, Nucleus, find_nucleus
from jentropy.vocabulary import Gradient, Head, default_num_chunks, make_head, sweep


class NucleusKind(NamedTuple):
    """The smallest set of most probable ids with `mass` in (0, 1]; `released` as in `features.find_nucleus`."""

    mass: float
    released: bool = False


class _Inside(NamedTuple):
    """Each row's nucleus and its sums, `[N]`: `total = Σ k e^x`, `first = Σ k x e^x`, k how much of an id is kept."""

    nucleus: Nucleus
    total: Array
    first: Array

    def mean(self) -> Array:
        return self.first / self._safe_total()

    def entropy(self) -> Array:
        return jnp.maximum(jnp.log(self._safe_total()) - self.mean(), 0.0)

    def probability(self, weight: Array) -> Array:
        """Of each id under the renormalised distribution, 0 outside."""
        return self.nucleus.keep(weight) * weight / self._safe_total()[:, None]

    def _safe_total(self) -> Array:
        return jnp.where(self.total == 0.0, 1.0, self.total)


def nucleus_entropies(
    hidden: Array,
    unembed: Array,
    kinds: tuple[NucleusKind, ...],
    *,
    temperature: Array | float = 1.0,
    bias: Array | None = None,
    vocab_mask: Array | None = None,
    num_chunks: int | None = None,
    num_blocks: int | None = None,
) -> tuple[Array, ...]:
    """Entropy of the distribution restricted to each kind of nucleus and renormalised there.

    With q the renormalised distribution the gradient of the logits is `-q_v (log q_v + H)`; the set has no gradient. An
    empty set has entropy 0 and gradient 0. Values and gradients are those of `features.nucleus_entropy` and
    `features.nucleus_entropy_released` on the whole logits.

    Args:
      hidden: `[..., D]` float.
      unembed: `[V, D]` float.
      kinds: the nuclei; one pass over the logits serves all.
      temperature: scalar or `[...]`, above 0; not differentiated.
      bias: optional `[V]` float, finite.
      vocab_mask: optional bool `[V]`, False for ids that the policy cannot produce: never in a nucleus.
      num_chunks: into how many pieces the vocabulary is cut backward. By default as in `head.linear_scores`, but in
        chunks of half the size, since more arrays are alive at once.
      num_blocks: into how many pieces the rows are cut forward; by default as many, but of at least 32 rows.

    Returns:
      One array `[...]` per kind, nats, at least 0; gradients go to `hidden`, `unembed` and `bias`.

    Raises:
      ValueError: a mass is outside (0, 1], the number of chunks outside [1, V] or that of blocks below 1.
    """
    for kind in kinds:
        require(0.0 < kind.mass <= 1.0, "mass", kind.mass, "in (0, 1]")
    leading = hidden.shape[:-1]
    num_rows = math.prod(leading)
    chex.assert_rank(unembed, 2)
    if num_chunks is None:
        num_chunks = default_num_chunks(num_rows, unembed.shape[0], chunk_size=2048)
    if num_blocks is None:
        num_blocks = min(num_chunks, max(num_rows // 32, 1))
    require(num_blocks >= 1, "num_blocks", num_blocks, "at least 1")
    head = make_head(hidden, unembed, bias, temperature, vocab_mask, num_chunks)
    entropies: tuple[Array, ...] = _nucleus_entropies(kinds, num_blocks, head)
    return tuple(entropy.reshape(leading) for entropy in entropies)


def _by_blocks(function: Callable[[Any], Any], rows: Any, num_blocks: int) -> Any:
    """`function` on `num_blocks` blocks of rows, or up to twice as many if that divides the rows; joined.

    The blocks are strided, so that rows sharded over devices stay where they are.
    """
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    if num_blocks == 1 or num_rows <= 1:
        return function(rows)
    num_blocks = next((n for n in range(num_blocks, 2 * num_blocks + 1) if num_rows % n == 0), num_blocks)
    size = -(-num_rows // num_blocks)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, -num_rows % size)] + [(0, 0)] * (x.ndim - 1), mode="edge")
        return x.reshape(size, -1, *x.shape[1:])

    def block(i: Array) -> Any:
        return function(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), blocks))

    blocks = jax.tree.map(cut, rows)
    found = jax.lax.map(block, jnp.arange(-(-num_rows // size), dtype=jnp.int32))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:num_rows], found)


def _flat(head: Head) -> Head:
    """The arrays of the vocabulary without chunks, `[V, ...]`."""
    unembed = head.unembed.reshape(-1, head.unembed.shape[-1])
    bias, legal = (None if x is None else x.reshape(-1) for x in (head.bias, head.legal))
    return head._replace(unembed=unembed, bias=bias, legal=legal)


def _all_logits(flat: Head, hidden: Array, temperature: Array) -> Array:
    """z of some rows over the whole vocabulary, which is one chunk here."""
    bias, legal = (None if x is None else x[:, None] for x in (flat.bias, flat.legal))
    return Head(hidden, flat.unembed[:, None], bias, temperature, legal).logits(0)


def _weight(z: Array, shift: Array) -> tuple[Array, Array]:
    """x = z - shift and e^x, which is 0 for illegal ids."""
    x = z - shift[:, None]
    return x, jnp.where(z <= LOG_ZERO, 0.0, jnp.exp(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nucleus_entropies(kinds: tuple[NucleusKind, ...], num_blocks: int, head: Head) -> tuple[Array, ...]:
    return _forward(kinds, num_blocks, head)[0]


def _forward(kinds: tuple[NucleusKind, ...], num_blocks: int, head: Head) -> tuple[tuple[Array, ...], tuple]:
    flat = _flat(head)

    def find(rows: tuple[Array, Array]) -> tuple[Array, tuple[_Inside, ...]]:
        z = _all_logits(flat, *rows)
        shift = z.max(1)
        x, weight = _weight(z, shift)
        found = []
        for mass, released in kinds:
            nucleus = find_nucleus(weight, jnp.asarray(mass, weight.dtype), released=released)
            kept = nucleus.keep(weight) * weight
            found.append(_Inside(nucleus, kept.sum(1), (kept * x).sum(1)))
        return shift, tuple(found)

    shift, insides = _by_blocks(find, (head.hidden, head.temperature), num_blocks)
    return tuple(inside.entropy() for inside in insides), (head, shift, insides)


def _backward(kinds: tuple[NucleusKind, ...], num_blocks: int, residuals: tuple, g: tuple[Array, ...]) -> tuple[Head]:
    del kinds, num_blocks
    head, shift, insides = residuals

    def step(gradient: Gradient, i: Array | int) -> Gradient:
        x, weight = _weight(head.logits(i), shift)
        parts = (-gi[:, None] * q.probability(weight) * (x - q.mean()[:, None]) for gi, q in zip(g, insides))
        return head.add_gradient(gradient, functools.reduce(jnp.add, parts), i)

    return (head.cotangent(sweep(step, head.no_gradient(), head.num_chunks)),)


_nucleus_entropies.defvjp(_forward, _backward)

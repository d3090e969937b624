"""Entropy, log-probability and divergences on plain logits `[..., V]`: for notebooks, theory, and to test the head.

Every function takes logits of any leading shape and works on π = softmax(logits / temperature) over the legal ids:
those with `vocab_mask` True and a logit other than -inf. Illegal ids have probability 0, never contribute and get
gradient 0. Values are in nats, float32 (float64 for float64 logits), whatever the dtype of the logits. The maximum is
subtracted before the exponential, so an offset common to all logits costs no accuracy beyond the rounding of the logits
themselves. A row without any legal id has entropy 0 and log-probabilities `LOG_ZERO`, with gradient 0; NaN gives NaN.

verl 0.9.1 and TRL 1.16 return NaN for rows that hold -inf (0 · inf), and compute in the dtype of the logits.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy.base import Array, require

LOG_ZERO = -1e30
"""Stands for log 0. Finite, so that differences and sums over a batch of tokens stay finite (two copies of the smallest
float32 would already add up to -inf), and exp(LOG_ZERO) is 0."""


def statistic_dtype(dtype: Any) -> Any:
    """The dtype in which statistics of `dtype` arrays are computed and returned: float64 for float64, else float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


class _Softmax(NamedTuple):
    """π in pieces: `p = weight / total`, `log p = shifted - log total`, `log_normaliser = shift + log total`."""

    legal: Array  # [..., V] bool
    shifted: Array  # [..., V] logits / temperature - shift, 0 where illegal
    weight: Array  # [..., V] exp(shifted), 0 where illegal
    shift: Array  # [...] the largest legal logit / temperature, without gradient
    total: Array  # [...] Σ weight, at least 1

    @property
    def probability(self) -> Array:
        return self.weight / self.total[..., None]

    @property
    def log_probability(self) -> Array:
        """log p where legal, 0 elsewhere."""
        return jnp.where(self.legal, self.shifted - jnp.log(self.total)[..., None], 0.0)


def _scaled(logits: Array, temperature: Array | float, vocab_mask: Array | None) -> tuple[Array, Array]:
    """(logits / temperature, 0 where illegal; which ids are legal), both `[..., V]`."""
    logits = logits.astype(statistic_dtype(logits.dtype))
    scale = jnp.asarray(temperature, logits.dtype)
    scale = scale[..., None] if scale.ndim else scale
    legal = logits != -jnp.inf
    if vocab_mask is not None:
        legal &= jnp.broadcast_to(vocab_mask, logits.shape)
    return jnp.where(legal, logits, 0.0) / scale, legal


def _normalise(z: Array, legal: Array, keep: Array | None = None) -> _Softmax:
    """π over the legal ids; with `keep` `[..., V]` every id counts that many times."""
    shift = jax.lax.stop_gradient(jnp.max(jnp.where(legal, z, LOG_ZERO), axis=-1))
    shifted = jnp.where(legal, z - shift[..., None], 0.0)
    weight = jnp.where(legal, jnp.exp(shifted) if keep is None else keep * jnp.exp(shifted), 0.0)
    total = jnp.where(legal.any(-1), weight.sum(-1), 1.0)
    return _Softmax(legal, shifted, weight, shift, total)


def _softmax(logits: Array, temperature: Array | float, vocab_mask: Array | None) -> _Softmax:
    return _normalise(*_scaled(logits, temperature, vocab_mask))


def log_prob(
    logits: Array, tokens: Array, *, temperature: Array | float = 1.0, vocab_mask: Array | None = None
) -> Array:
    """Log-probability of each token, `log π(token)`, at most 0.

    Args:
      logits: `[..., V]` float.
      tokens: `[...]` int. An illegal id, or one outside `[0, V)`, gets `LOG_ZERO` with gradient 0.
      temperature: scalar or `[...]`, above 0.
      vocab_mask: optional bool `[V]` or `[..., V]`, False for ids that the policy cannot produce.

    Returns:
      `[...]`, nats.
    """
    chex.assert_shape(logits, (*tokens.shape, None))
    chex.assert_type(tokens, int)
    pi = _softmax(logits, temperature, vocab_mask)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hit = (ids == tokens.astype(jnp.int32)[..., None]) & pi.legal
    value = jnp.where(hit, pi.log_probability, 0.0).sum(-1)
    return jnp.where(hit.any(-1), value, LOG_ZERO)


def log_normaliser(logits: Array, *, temperature: Array | float = 1.0, vocab_mask: Array | None = None) -> Array:
    """`log Σ_v exp(z_v / temperature)` over the legal ids; gradient π / temperature. Arguments as in `entropy`."""
    chex.assert_type(logits, float)
    pi = _softmax(logits, temperature, vocab_mask)
    return pi.shift + jnp.log(pi.total)


def entropy(logits: Array, *, temperature: Array | float = 1.0, vocab_mask: Array | None = None) -> Array:
    """Entropy of the whole distribution: `H = -Σ_v p_v log p_v = log s - u / s`.

    Here s = Σ e^x, u = Σ x e^x and x = z / temperature - max. Gradient: ∂H/∂z_v = -p_v (log p_v + H) / temperature.

    Args:
      logits: `[..., V]` float, -inf allowed.
      temperature: scalar or `[...]`, above 0.
      vocab_mask: optional bool `[V]` or `[..., V]`, False for ids that the policy cannot produce.

    Returns:
      `[...]`, nats, at least 0.
    """
    chex.assert_type(logits, float)
    return _entropy(*_scaled(logits, temperature, vocab_mask))


@jax.custom_jvp
def _entropy(z: Array, legal: Array, keep: Array | None = None) -> Array:
    pi = _normalise(z, legal, keep)
    return jnp.maximum(jnp.log(pi.total) - (pi.weight * pi.shifted).sum(-1) / pi.total, 0.0)


@_entropy.defjvp
def _entropy_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    # log p + H = x - u / s: small where it should be, whereas log p and H cancel for a nearly uniform π.
    pi = _normalise(*primals)
    centred = pi.shifted - (pi.probability * pi.shifted).sum(-1)[..., None]
    return _entropy(*primals), -(pi.probability * centred * tangents[0]).sum(-1)


def varentropy(logits: Array, *, temperature: Array | float = 1.0, vocab_mask: Array | None = None) -> Array:
    """Variance of the surprise, `Σ_v p_v (log p_v + H)²`, nats². Arguments as in `entropy`."""
    chex.assert_type(logits, float)
    pi = _softmax(logits, temperature, vocab_mask)
    p, x = pi.probability, pi.shifted
    return (p * jnp.square(x - (p * x).sum(-1)[..., None])).sum(-1)


class Nucleus(NamedTuple):
    """Which ids of a row are kept, by weight: none below `low`, `share` of each below `high`, the rest whole. `[...]`.

    `low` and `high` lie halfway between neighbouring weights, so that weights computed again, with other rounding, give
    the same set.
    """

    low: Array
    high: Array
    share: Array

    def keep(self, weight: Array) -> Array:
        """How much of each id is kept, in [0, 1], `[..., V]`."""
        low, high, share = (x[..., None] for x in self)
        return jnp.where(weight < low, 0.0, jnp.where(weight < high, share, 1.0))


def find_nucleus(weight: Array, mass: Array, *, released: bool = False) -> Nucleus:
    """The most probable ids whose weights add up to `mass` of the whole.

    The weight of the id that crosses the mass is found by bisection on the bits of the weights: as many sums over the
    row as a float has bits, no sort, exact up to the rounding of sums.

    Args:
      weight: `[..., V]` float in [0, 1], proportional to the probability; 0 for illegal ids. No gradient.
      mass: scalar in (0, 1], in the dtype of `weight`.
      released: leave out the id that crosses the mass. Of ids tied with it, as many as stay below the mass are kept: of
        each one the same share, so that the choice among them does not matter.
    """
    bits = jnp.finfo(weight.dtype).bits
    key_dtype = jnp.dtype(f"int{bits}")
    target = mass * weight.sum(-1)

    def value(key: Array) -> Array:
        return jax.lax.bitcast_convert_type(key, weight.dtype)

    def refine(i: Array, prefix: Array) -> Array:
        candidate = prefix | jnp.left_shift(jnp.ones((), key_dtype), jnp.asarray(bits - 3 - i, key_dtype))
        enough = jnp.where(weight >= value(candidate)[..., None], weight, 0.0).sum(-1) >= target
        return jnp.where(enough, candidate, prefix)

    # Floats that are not negative are ordered like their bits, and weights up to 1 leave the two highest bits unset.
    last = value(jax.lax.fori_loop(0, bits - 2, refine, jnp.zeros(target.shape, key_dtype)))
    lower = jnp.max(weight, axis=-1, where=weight < last[..., None], initial=0.0)
    low = _between(lower, last)
    if not released:
        return Nucleus(low, low, jnp.ones_like(low))
    above = weight > last[..., None]
    high = _between(last, jnp.min(weight, axis=-1, where=above, initial=jnp.inf))
    num_ties = (weight == last[..., None]).sum(-1, dtype=weight.dtype)
    share = _num_below(target, jnp.where(above, weight, 0.0).sum(-1), last, num_ties) / jnp.maximum(num_ties, 1.0)
    return Nucleus(low, high, jnp.where(last > 0.0, share, 1.0))


def _between(a: Array, b: Array) -> Array:
    """The middle of a < b, or b if they are neighbours."""
    middle = a + (b - a) / 2.0
    return jnp.where(middle > a, middle, b)


def _num_below(target: Array, start: Array, step: Array, num: Array) -> Array:
    """The largest k < num with start + k · step < target, at least 0."""
    k = jnp.floor((target - start) / jnp.where(step > 0.0, step, 1.0))
    k = jnp.where(start + (k + 1.0) * step < target, k + 1.0, k)
    k = jnp.where(start + k * step < target, k, k - 1.0)
    return jnp.maximum(jnp.minimum(k, num - 1.0), 0.0)


def _check_mass(mass: Array | float) -> None:
    if isinstance(mass, int | float):
        require(0.0 < mass <= 1.0, "mass", mass, "in (0, 1]")


def nucleus_mask(
    logits: Array, mass: Array | float, *, temperature: Array | float = 1.0, vocab_mask: Array | None = None
) -> Array:
    """The smallest set of most probable ids whose probability is at least `mass`; ids tied with the last one are kept.

    Args:
      logits: `[..., V]` float, -inf allowed.
      mass: scalar, in (0, 1].
      temperature: scalar or `[...]`, above 0.
      vocab_mask: optional bool `[V]` or `[..., V]`.

    Returns:
      bool `[..., V]`, without gradient; at least one legal id per row, never an illegal one. See `find_nucleus`.
    """
    _check_mass(mass)
    pi = _softmax(jax.lax.stop_gradient(logits), temperature, vocab_mask)
    nucleus = find_nucleus(pi.weight, jnp.asarray(mass, pi.weight.dtype))
    return ~(pi.weight < nucleus.low[..., None]) & pi.legal


def nucleus_entropy(
    logits: Array, mass: Array | float, *, temperature: Array | float = 1.0, vocab_mask: Array | None = None
) -> Array:
    """Entropy of π restricted to its nucleus (see `nucleus_mask`) and renormalised there; the set has no gradient.

    Args:
      logits: `[..., V]` float, -inf allowed.
      mass: scalar, in (0, 1]; 1 gives `entropy`.
      temperature: scalar or `[...]`, above 0.
      vocab_mask: optional bool `[V]` or `[..., V]`.

    Returns:
      `[...]`, nats, at least 0.

    Reference: SIREN, arXiv 2509.25133; the renormalisation is the released code's.
    """
    chex.assert_type(logits, float)
    keep = nucleus_mask(logits, mass, temperature=temperature, vocab_mask=vocab_mask)
    return entropy(logits, temperature=temperature, vocab_mask=keep)


def nucleus_entropy_released(
    logits: Array, mass: Array | float, *, temperature: Array | float = 1.0, vocab_mask: Array | None = None
) -> Array:
    """`nucleus_entropy` of the released code's set, which leaves out the id that crosses the mass.

    If the most probable id alone has the mass, the set is empty: 0, with gradient 0. Ids tied with the crossing one are
    kept as far as they stay below the mass; the gradient is the mean over the choices among them (the released code
    takes those that its sort puts first). The released code adds 1e-12 to the sum of the set and inside the logarithm,
    and looks no further than the 10,000 most probable ids.

    Args and result as `nucleus_entropy`.

    Reference: github.com/Linn3a/siren, `dp_actor.efficient_top_p_sampling`.
    """
    chex.assert_type(logits, float)
    _check_mass(mass)
    z, legal = _scaled(logits, temperature, vocab_mask)
    weight = jax.lax.stop_gradient(_normalise(z, legal).weight)
    keep = find_nucleus(weight, jnp.asarray(mass, weight.dtype), released=True).keep(weight)
    return _entropy(z, legal & ~(keep <= 0.0), keep)


def kl(logits_p: Array, logits_q: Array, *, temperature: Array | float = 1.0, vocab_mask: Array | None = None) -> Array:
    """`D_KL(p ‖ q) = Σ_v p_v (log p_v - log q_v)`, both at the same temperature.

    Args:
      logits_p: `[..., V]` float, -inf allowed.
      logits_q: `[..., V]` float. Where -inf meets a legal id of p the divergence is infinite; log q counts as
        `LOG_ZERO` there, so the value is huge and finite and q gets no gradient from that id.
      temperature: scalar or `[...]`, above 0.
      vocab_mask: optional bool `[V]` or `[..., V]`, of both.

    Returns:
      `[...]`, nats, at least 0.
    """
    chex.assert_equal_shape([logits_p, logits_q])
    p, q = _softmax(logits_p, temperature, vocab_mask), _softmax(logits_q, temperature, vocab_mask)
    log_q = jnp.where(q.legal, q.log_probability, LOG_ZERO)
    value = (p.probability * (p.log_probability - log_q)).sum(-1)
    return value + jax.lax.stop_gradient(jnp.maximum(value, 0.0) - value)  # not below 0 by rounding, gradient kept

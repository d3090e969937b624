"""The fused linear head: hidden states and unembedding in, log-probabilities and entropies out, no `[N, V]` array.

Logits are `z = (hidden · unembedᵀ + bias) / temperature`. The vocabulary is cut into chunks. The forward pass sweeps
them with a running maximum and sums per row; the backward pass computes each chunk's logits again and turns them into
gradients. What is kept in between is the inputs and a few numbers per row.

Precision: products are taken in the dtype of `hidden` and accumulated in float32; statistics and results are float32.
A float32 `hidden` gets full float32 products on every backend, a bfloat16 one gets bfloat16 products, forward and
backward (the gradient of the logits is rounded for them). With a float64 `hidden` everything is float64.

References: the online sum is that of arXiv 1805.02867; verl 0.9.1 (`linear_cross_entropy`) and Liger fuse the same
quantities in kernels; TRL 1.16's chunked head drops the gradient of the entropy.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy.base import Array
from jentropy.features import LOG_ZERO
from jentropy.vocabulary import Gradient, Head, Moments, default_num_chunks, make_head, sweep


class Scores(NamedTuple):
    """Per token, `[...]` in nats: `log_prob <= 0`, `entropy >= 0`, `log_normaliser = log Σ_v exp(z_v)`."""

    log_prob: Array
    entropy: Array
    log_normaliser: Array


class PairScores(NamedTuple):
    """Per token, `[...]` in nats.

    `kl = D_KL(p ‖ q)`, `reverse_kl = D_KL(q ‖ p)`, `covariance = Cov_p(log p, z_q - z_p)`, `entropy` of p.
    """

    kl: Array
    reverse_kl: Array
    covariance: Array
    entropy: Array


def linear_scores(
    hidden: Array,
    unembed: Array,
    tokens: Array,
    *,
    temperature: Array | float = 1.0,
    bias: Array | None = None,
    vocab_mask: Array | None = None,
    num_chunks: int | None = None,
) -> Scores:
    """Log-probability of each token, entropy and log-normaliser of its distribution, all differentiable.

    With `l_v = log p_v` and the cotangents g of the three results, the gradient of the logits is
    `p_v (g_normaliser - g_log_prob - g_entropy (l_v + H)) + g_log_prob [v = token]`.

    Args:
      hidden: `[..., D]` float.
      unembed: `[V, D]` float.
      tokens: `[...]` int. An id that `vocab_mask` rules out, or one outside `[0, V)`, gets the log-probability
        `features.LOG_ZERO` (-1e30, finite) with gradient 0.
      temperature: scalar or `[...]`, above 0; not differentiated.
      bias: optional `[V]` float, finite.
      vocab_mask: optional bool `[V]`, False for ids that the policy cannot produce: probability 0, gradient 0.
      num_chunks: into how many pieces the vocabulary is cut; `vocabulary.default_num_chunks` if None. If it does not
        divide V, a padded copy of the unembedding is made.

    Returns:
      `Scores`; gradients go to `hidden`, `unembed` and `bias`.
    """
    chex.assert_equal_shape_prefix([hidden, tokens], tokens.ndim)
    chex.assert_rank(hidden, tokens.ndim + 1)
    chex.assert_type(tokens, int)
    vocab_size = unembed.shape[0]
    if num_chunks is None:
        num_chunks = default_num_chunks(tokens.size, vocab_size)
    head = make_head(hidden, unembed, bias, temperature, vocab_mask, num_chunks)
    scores = _linear_scores(head, tokens.reshape(-1).astype(jnp.int32))
    log_prob, entropy, log_normaliser = (x.reshape(tokens.shape) for x in scores)
    found = (tokens >= 0) & (tokens < vocab_size)
    if vocab_mask is not None:
        found &= vocab_mask[jnp.clip(tokens, 0, vocab_size - 1)]
    return Scores(jnp.where(found, log_prob, LOG_ZERO), entropy, log_normaliser)


def pair_scores(
    hidden: Array,
    unembed: Array,
    hidden_other: Array,
    unembed_other: Array,
    *,
    temperature: Array | float = 1.0,
    vocab_mask: Array | None = None,
    num_chunks: int | None = None,
) -> PairScores:
    """Compares p, of the first hidden state and unembedding, with q, of the other pair, over the whole vocabulary.

    The divergences are sums of the non-negative `p (δ + e^-δ - 1)`, δ = log p - log q, in a second sweep once both
    normalisers are known, so that they keep their relative accuracy when p and q are close. To first order in
    `z_q - z_p` the entropy of q is that of p minus `covariance` (Lemma 1 of arXiv 2505.22617).

    Args:
      hidden: `[..., D]` float.
      unembed: `[V, D]` float.
      hidden_other: `[..., E]` float.
      unembed_other: `[V, E]` float.
      temperature: scalar or `[...]`, above 0, of both; not differentiated.
      vocab_mask: optional bool `[V]`, False for ids that neither can produce.
      num_chunks: as in `linear_scores`; by default in chunks of half the size, since more arrays are alive at once.

    Returns:
      `PairScores`; `kl` and `reverse_kl` send gradients to all four arrays, `entropy` to the first pair, `covariance`
      to none.
    """
    leading = hidden.shape[:-1]
    chex.assert_equal_shape_prefix([hidden, hidden_other], len(leading))
    chex.assert_equal_shape_prefix([unembed, unembed_other], 1)
    if num_chunks is None:
        rows = math.prod(leading)
        num_chunks = default_num_chunks(rows, unembed.shape[0], chunk_size=2048)
    p = make_head(hidden, unembed, None, temperature, vocab_mask, num_chunks)
    q = make_head(hidden_other, unembed_other, None, temperature, vocab_mask, num_chunks)
    return PairScores(*(x.reshape(leading) for x in _pair_scores(p, q)))


@jax.custom_vjp
def _linear_scores(head: Head, tokens: Array) -> Scores:
    return _linear_forward(head, tokens)[0]


def _linear_forward(head: Head, tokens: Array) -> tuple[Scores, tuple]:
    def chunk(i: Array | int) -> tuple[Moments, Array]:
        z = head.logits(i)
        column = jnp.clip(tokens // head.num_chunks, 0, z.shape[1] - 1)
        logit = jnp.take_along_axis(z, column[:, None], axis=1, mode="promise_in_bounds")[:, 0]
        return Moments.of(z), jnp.where(tokens % head.num_chunks == i, logit, 0.0)

    def step(carry: tuple[Moments, Array], i: Array | int) -> tuple[Moments, Array]:
        moments, logit = chunk(i)
        return carry[0].merge(moments), carry[1] + logit

    start = Moments.empty(head.temperature), jnp.zeros_like(head.temperature)
    moments, logit = chunk(0) if head.num_chunks == 1 else sweep(step, start, head.num_chunks)
    log_total = jnp.log(moments.total)
    log_prob = jnp.minimum((logit - moments.shift) - log_total, 0.0)
    scores = Scores(log_prob, moments.entropy(), moments.shift + log_total)
    return scores, (head, tokens, moments)


def _linear_backward(residuals: tuple, g: Scores) -> tuple[Head, None]:
    head, tokens, moments = residuals

    def step(gradient: Gradient, i: Array | int) -> Gradient:
        z = head.logits(i)
        slope = (g.log_normaliser - g.log_prob)[:, None] - g.entropy[:, None] * moments.centred(z)
        dz = moments.probability(z) * slope + jnp.where(head.hits(tokens, i), g.log_prob[:, None], 0.0)
        return head.add_gradient(gradient, dz, i)

    return head.cotangent(sweep(step, head.no_gradient(), head.num_chunks)), None


_linear_scores.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def _pair_scores(p: Head, q: Head) -> PairScores:
    return _pair_forward(p, q)[0]


def _pair_forward(p: Head, q: Head) -> tuple[PairScores, tuple]:
    def normalise(carry: tuple[Moments, Moments], i: Array | int) -> tuple[Moments, Moments]:
        return carry[0].merge(Moments.of(p.logits(i))), carry[1].merge(Moments.of(q.logits(i)))

    none = Moments.empty(p.temperature)
    moments_p, moments_q = sweep(normalise, (none, none), p.num_chunks)

    def compare(carry: tuple[Array, Array, Array], i: Array | int) -> tuple[Array, Array, Array]:
        z_p, z_q = p.logits(i), q.logits(i)
        prob_p, prob_q = moments_p.probability(z_p), moments_q.probability(z_q)
        delta = moments_p.log_probability(z_p) - moments_q.log_probability(z_q)
        kl, reverse_kl = _divergence(prob_p, prob_q, delta), _divergence(prob_q, prob_p, -delta)
        covariance = prob_p * moments_p.centred(z_p) * -delta
        return carry[0] + kl.sum(1), carry[1] + reverse_kl.sum(1), carry[2] + covariance.sum(1)

    zero = jnp.zeros_like(p.temperature)
    kl, reverse_kl, covariance = sweep(compare, (zero, zero, zero), p.num_chunks)
    scores = PairScores(jnp.maximum(kl, 0.0), jnp.maximum(reverse_kl, 0.0), covariance, moments_p.entropy())
    return scores, (p, q, moments_p, moments_q, scores)


def _divergence(p: Array, q: Array, delta: Array) -> Array:
    """Each id's part of D_KL(p ‖ q), `p δ - p + q` with δ = log p - log q, without cancellation for small δ."""
    return jnp.where(jnp.abs(delta) < 1.0, p * (delta + jnp.expm1(-delta)), p * delta + (q - p))


def _pair_backward(residuals: tuple, g: PairScores) -> tuple[Head, Head]:
    p, q, moments_p, moments_q, scores = residuals
    g_kl, g_reverse_kl, g_entropy = g.kl[:, None], g.reverse_kl[:, None], g.entropy[:, None]

    def step(gradients: tuple[Gradient, Gradient], i: Array | int) -> tuple[Gradient, Gradient]:
        z_p, z_q = p.logits(i), q.logits(i)
        prob_p, prob_q = moments_p.probability(z_p), moments_q.probability(z_q)
        delta = moments_p.log_probability(z_p) - moments_q.log_probability(z_q)
        slope = g_kl * (delta - scores.kl[:, None]) - g_entropy * moments_p.centred(z_p)
        dz_p = prob_p * slope + g_reverse_kl * (prob_p - prob_q)
        dz_q = g_kl * (prob_q - prob_p) - prob_q * g_reverse_kl * (delta + scores.reverse_kl[:, None])
        return p.add_gradient(gradients[0], dz_p, i), q.add_gradient(gradients[1], dz_q, i)

    gradients = sweep(step, (p.no_gradient(), q.no_gradient()), p.num_chunks)
    return p.cotangent(gradients[0]), q.cotangent(gradients[1])


_pair_scores.defvjp(_pair_forward, _pair_backward)

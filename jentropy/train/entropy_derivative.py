"""How fast the entropy of every token changes along a direction in the space of parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from jentropy import head
from jentropy.base import Array, Policy, Rollouts
from jentropy.features import statistic_dtype
from jentropy.train.scoring import from_micro, to_micro


def entropy_derivative(
    policy: Policy, params: Any, tangent: Any, rows: Rollouts, temperature: float, *, num_microbatches: int = 1
) -> Array:
    """d/dε H_t(θ + ε dθ) at ε = 0, of the next-token distribution at every token of the rows, `[B, T]`.

    The hidden states are differentiated by `jax.jvp`, and the head exactly, without a `[N, V]` array: for logits z with
    the tangent dz the entropy changes by -Cov_{a~π}(log π(a), dz(a)) (Lemma 1 of arXiv 2505.22617 to first order). With
    dθ the change that an update makes to the parameters, it predicts that update's change of the entropy.

    `head.pair_scores` compares z with z + s·dz. The covariance is linear in s, so s is chosen per token to make s·dz
    about as large as z: the step of an optimizer is small, and `z + dz` would lose its last digits.

    Args:
      policy: the model.
      params: θ.
      tangent: dθ, of the structure and dtypes of `params`.
      rows: B rows; a row's own temperatures, `token_data["temperature"]`, take the place of `temperature`.
      temperature: of sampling: the entropy is that of softmax(logits / temperature).
      num_microbatches: parts in which it is computed; changes memory, not results.

    Returns:
      `[B, T]`, nats per unit of `tangent`, 0 outside `loss_mask`.
    """
    unembed, unembed_dot = jax.jvp(policy.unembed, (params,), (tangent,))
    both = jnp.concatenate([unembed, unembed_dot], axis=-1)
    weight_size = _ratio(unembed_dot, unembed)

    def derivative(part: Rollouts) -> Array:
        hidden, hidden_dot = jax.jvp(lambda p: policy.hidden(p, part.tokens)[:, :-1], (params,), (tangent,))
        size = _ratio(hidden_dot, hidden, -1) + weight_size
        scale = 1 / jnp.where(size > jnp.finfo(size.dtype).tiny, size, 1)
        step = scale[..., None].astype(hidden.dtype)
        moved = jnp.concatenate([hidden + step * hidden_dot, step * hidden], axis=-1)
        still = jnp.concatenate([hidden, jnp.zeros_like(hidden)], axis=-1)
        tau = part.token_data["temperature"][:, 1:] if "temperature" in part.token_data else temperature
        covariance = head.pair_scores(still, both, moved, both, temperature=tau).covariance
        slope = -covariance / scale.astype(covariance.dtype)
        return jnp.where(part.loss_mask, jnp.pad(slope, ((0, 0), (1, 0))), 0)

    if num_microbatches == 1:
        return derivative(rows)
    return from_micro(jax.lax.map(derivative, to_micro(rows, num_microbatches)))


def _ratio(dot: Array, x: Array, axis: int | None = None) -> Array:
    """Largest entry of `dot` over the largest of `x`, both by size, in the dtype of statistics."""
    dtype = statistic_dtype(x.dtype)
    dot_size, size = (jnp.max(jnp.abs(a.astype(dtype)), axis=axis) for a in (dot, x))
    return dot_size / jnp.maximum(size, jnp.finfo(dtype).tiny)

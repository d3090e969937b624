"""The value of a state under a policy whose divergence from a reference is charged, exactly over the vocabulary.

    V(s) = Σ_v π(v|s) (Q(s, v) - β (log π(v|s) - log ρ(v|s)))

Three models at every token: the columns are cut into chunks, whose logits are computed when they are needed.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy.base import Array, require
from jentropy.features import LOG_ZERO, statistic_dtype

MAX_CHUNK = 2**22
"""Logits of one model that are alive at once, unless a single column has more."""


class LinearHead(NamedTuple):
    """Logits `hidden · unembedᵀ` over the vocabulary, before the token of each column.

    Attributes:
      hidden: `[B, T, D]` float; column t has read the tokens before t.
      unembed: `[V, D]` float.
    """

    hidden: Array
    unembed: Array


class Heads(NamedTuple):
    """The three models on the same rows; their widths D may differ, V may not.

    Attributes:
      policy: π.
      reference: ρ, frozen.
      critic: Q, whose logits are values: not divided by the temperature.
    """

    policy: LinearHead
    reference: LinearHead
    critic: LinearHead


def _log_softmax(logits: Array, temperature: Array, vocab_mask: Array | None) -> tuple[Array, Array]:
    """log π where legal, about `LOG_ZERO` elsewhere, and which ids are legal, both `[..., V]`."""
    legal = logits != -jnp.inf
    if vocab_mask is not None:
        legal &= jnp.broadcast_to(vocab_mask, logits.shape)
    scaled = jnp.where(legal, logits, 0.0) / temperature
    return jax.nn.log_softmax(jnp.where(legal, scaled, LOG_ZERO)), legal


def soft_value(
    pi_logits: Array,
    rho_logits: Array,
    q: Array,
    beta: Array | float,
    *,
    temperature: Array | float = 1.0,
    vocab_mask: Array | None = None,
) -> Array:
    """V = Σ_v π_v (Q_v - β (log π_v - log ρ_v)), exactly, with a gradient to π only.

    Its negative is ETPO's loss of the policy, and its largest value, β log Σ_v ρ_v exp(Q_v / β), is that of
    π ∝ ρ exp(Q / β). π and ρ are those of the sampling temperature; the released code samples at 0.5 from the 50
    most probable tokens and takes V at 1.

    Args:
      pi_logits: `[..., V]` float, -inf allowed.
      rho_logits: `[..., V]` float. Where -inf meets a legal id of π, log ρ counts as `features.LOG_ZERO`.
      q: `[..., V]` float; what it holds for illegal ids does not matter.
      beta: β, scalar.
      temperature: scalar or `[...]`, above 0, of π and ρ.
      vocab_mask: optional bool `[V]` or `[..., V]`, False for ids that the policy cannot produce.

    Returns:
      `[...]`, in the dtype of statistics; 0 for a state without a legal id.
    """
    chex.assert_equal_shape([pi_logits, rho_logits, q])
    pi_logits, rho_logits, q = (x.astype(statistic_dtype(x.dtype)) for x in (pi_logits, rho_logits, q))
    scale = jnp.asarray(temperature, pi_logits.dtype)
    scale = scale[..., None] if scale.ndim else scale
    rho_logits, q = jax.lax.stop_gradient((rho_logits, q))
    log_pi, legal = _log_softmax(pi_logits, scale, vocab_mask)
    log_rho, _ = _log_softmax(rho_logits, scale, vocab_mask)
    surprise = jnp.where(legal, log_pi - log_rho, 0.0)
    gain = jnp.where(legal, q, 0.0) - jnp.asarray(beta, log_pi.dtype) * surprise
    return jnp.sum(jnp.where(legal, jnp.exp(log_pi) * gain, 0.0), axis=-1)


def _logits(hidden: Array, unembed: Array) -> Array:
    precision = None if hidden.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
    dtype = statistic_dtype(hidden.dtype)
    unembed = unembed.astype(hidden.dtype)
    return jnp.einsum("btd,vd->btv", hidden, unembed, precision=precision, preferred_element_type=dtype)


def _cut(x: Array, columns: int) -> Array:
    """`[B, T, ...]` -> `[T / columns, B, columns, ...]`, padded with ones."""
    padding = [(0, 0), (0, -x.shape[1] % columns)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding, constant_values=1)
    return x.reshape(x.shape[0], -1, columns, *x.shape[2:]).swapaxes(0, 1)


def soft_values(
    heads: Heads,
    mask: Array,
    beta: Array | float,
    *,
    temperature: Array | float = 1.0,
    vocab_mask: Array | None = None,
    chunk_columns: int | None = None,
) -> Array:
    """`soft_value` of the state before each token, `[B, T]`, 0 outside the mask; gradient to `heads.policy` only.

    The columns are cut into chunks. The logits of one chunk are alive at a time, and the backward pass computes them
    again: no `[B, T, V]` array.

    Args:
      heads: the three models.
      mask: `[B, T]` bool, the tokens of the policy; the hidden states of the others may hold anything.
      beta: β, scalar.
      temperature: scalar or `[B, T]`, above 0, of π and ρ.
      vocab_mask: optional bool `[V]`, False for ids that the policy cannot produce.
      chunk_columns: columns of a chunk; if None, as many as keep its logits below `MAX_CHUNK` numbers, at least 1.

    Raises:
      ValueError: `chunk_columns` is below 1.
    """
    num_rows, num_columns = mask.shape
    unembeds = [head.unembed for head in heads]
    chex.assert_equal_shape_prefix(unembeds, 1)
    if chunk_columns is None:
        chunk_columns = max(1, MAX_CHUNK // max(1, num_rows * unembeds[0].shape[0]))
    require(chunk_columns >= 1, "chunk_columns", chunk_columns, "at least 1")
    chunk_columns = min(chunk_columns, max(num_columns, 1))
    for head in heads:
        chex.assert_shape(head.hidden, (num_rows, num_columns, head.unembed.shape[1]))
    hiddens = [jnp.where(mask[..., None], head.hidden, 0.0) for head in heads]
    scale = jnp.broadcast_to(jnp.asarray(temperature, statistic_dtype(hiddens[0].dtype)), mask.shape)
    scale = jnp.where(mask, scale, 1.0)

    def chunk(columns: tuple[Array, ...]) -> Array:
        *states, tau = columns
        pi, rho, q = (_logits(hidden, unembed) for hidden, unembed in zip(states, unembeds))
        return soft_value(pi, rho, q, beta, temperature=tau, vocab_mask=vocab_mask)

    cut = tuple(_cut(x, chunk_columns) for x in (*hiddens, scale))
    value = jax.lax.map(jax.checkpoint(chunk), cut).swapaxes(0, 1).reshape(num_rows, -1)
    return jnp.where(mask, value[:, :num_columns], 0.0)


def action_values(critic: LinearHead, tokens: Array, mask: Array) -> Array:
    """Q of each token, `[B, T]`, 0 outside the mask, without the other ids; differentiable.

    Args:
      critic: Q.
      tokens: `[B, T]` int32.
      mask: `[B, T]` bool; hidden states and tokens outside it may hold anything.
    """
    chex.assert_equal_shape([tokens, mask])
    hidden = jnp.where(mask[..., None], critic.hidden, 0.0)
    dtype = statistic_dtype(hidden.dtype)
    rows = critic.unembed[jnp.where(mask, tokens, 0)]
    return jnp.where(mask, jnp.sum(hidden.astype(dtype) * rows.astype(dtype), axis=-1), 0.0)


def last_token(mask: Array) -> Array:
    """The last True of each row, `[B, T]` bool: where a response that is one action ends."""
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    return mask & (jnp.cumsum(mask[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1] == 1)


def soft_bellman_targets(
    value: Array,
    reward: Array,
    mask: Array,
    gamma: Array | float,
    *,
    action_end: Array | None = None,
    bootstrap: Array | None = None,
) -> Array:
    """What Q(s_t, token t) should be, `[B, T]`, 0 outside the mask.

        y_t = V_{t'}                   inside an action: no reward, no discount
        y_t = R_t + γ V_{t'}           at its last token

    with t' the next column of the mask, so tokens between two actions (a tool's output) are skipped. After the last
    column of a row V is its `bootstrap`.

    The released code takes the divergence inside V of an action's later tokens from the next step of the environment;
    pass such a `value` to reproduce it.

    Args:
      value: `[B, T]` float, `soft_values` of the target critic; no gradient is to flow into it.
      reward: `[B, T]` float, read at the last token of an action only.
      mask: `[B, T]` bool, tokens of the policy.
      gamma: γ, scalar.
      action_end: `[B, T]` bool, last token of each action; the last of a row always is one, and the only one by
        default.
      bootstrap: `[B]` float, V of the state after the row, 0 where the episode is over; 0 by default.
    """
    chex.assert_rank([value, reward, mask], 2)
    chex.assert_equal_shape([value, reward, mask])
    ends = last_token(mask) if action_end is None else mask & (action_end | last_token(mask))
    after = jnp.zeros_like(value[:, 0]) if bootstrap is None else bootstrap.astype(value.dtype)
    gamma = jnp.asarray(gamma, value.dtype)

    def step(later: Array, column: tuple[Array, ...]) -> tuple[Array, Array]:
        v, r, used, end = column
        target = jnp.where(end, r + gamma * later, later)
        return jnp.where(used, v, later), jnp.where(used, target, 0.0)

    _, targets = jax.lax.scan(step, after, (value.T, reward.T, mask.T, ends.T), reverse=True)
    return targets.T

"""Sampling groups of responses with a cache: one prefill per prompt, one decoding step per token."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy import base, features
from jentropy.base import Array, State
from jentropy.samplers import Sampler, plain


class Samples(NamedTuple):
    """Sampled responses; row `p · num_generations + g` is generation g of prompt p. N = `max_new_tokens`.

    Attributes:
      tokens: `[B, T]` int32, T = prompt columns + N; prompt and response contiguous, then `pad_id`.
      log_prob: `[B, T]` float32, of each response token under softmax(logits / temperature), nats; 0 elsewhere.
        Truncation by the sampler does not enter.
      entropy: `[B, T]` float32, of the same distribution, nats; 0 elsewhere.
      response_mask: `[B, T]` bool, response tokens, the end-of-sequence token included.
      num_tokens: `[B]` int32, response tokens per row, between 1 and N.
      truncated: `[B]` bool, whether the row used up its tokens without an end-of-sequence token.
      temperature: `[B, T]` float32, that of each response token, the given one elsewhere; None if the sampler has no
        temperature rule.
    """

    tokens: Array
    log_prob: Array
    entropy: Array
    response_mask: Array
    num_tokens: Array
    truncated: Array
    temperature: Array | None = None


class _Draw(NamedTuple):
    """One token per row, or N of them: `[B]` or `[N, B]` each."""

    token: Array
    log_prob: Array
    entropy: Array
    temperature: Array | None


class _Loop(NamedTuple):
    """State of the decoding loop: tokens written so far, rows that draw no more, the policy's cache."""

    step: Array
    ended: Array
    num_tokens: Array
    drawn: _Draw
    cache: Any


def _gumbel(row_key: Array, step: Array, size: int) -> Array:
    """`[B, V]` Gumbel noise, one-dimensional per row, from `fold_in(row key, step)`."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), (size,), jnp.float32))(row_key)


def _repeat(x: Array, num: int, axis: int) -> Array:
    """Every entry along `axis` `num` times in a row."""
    return jnp.repeat(x, num, axis=axis, total_repeat_length=x.shape[axis] * num)


def _layout(prompts: Array, length: Array, drawn: _Draw, num_tokens: Array, pad_id: int) -> tuple[_Draw, Array]:
    """Joins prompts `[B, P]` and drawn `[N, B]`: what was drawn, and the response mask, all `[B, P + N]`."""
    num_new = drawn.token.shape[0]
    prompts = jnp.pad(prompts, ((0, 0), (0, num_new)))
    column = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None, :]
    index = column - length[:, None]
    in_response = (index >= 0) & (index < num_tokens[:, None])
    found = jax.tree.map(lambda x: jnp.take_along_axis(x.T, jnp.clip(index, 0, num_new - 1), axis=1), drawn)
    token = jnp.where(in_response, found.token, jnp.where(index < 0, prompts, pad_id))
    log_prob, entropy = (jnp.where(in_response, x, 0.0) for x in (found.log_prob, found.entropy))
    return found._replace(token=token, log_prob=log_prob, entropy=entropy), in_response


def _samples(prompts: Array, length: Array, end: _Loop, eos_id: int, pad_id: int, temperature: Array) -> Samples:
    """What the loop has drawn after the prompts `[B, P]` of its rows."""
    found, mask = _layout(prompts, length, end.drawn, end.num_tokens, pad_id)
    if found.temperature is not None:
        found = found._replace(temperature=jnp.where(mask, found.temperature, temperature))
    last_token = jnp.take_along_axis(end.drawn.token, end.num_tokens[None, :] - 1, axis=0)[0]
    return Samples(
        found.token, found.log_prob, found.entropy, mask, num_tokens=end.num_tokens, truncated=last_token != eos_id,
        temperature=found.temperature,
    )  # fmt: skip


def _choose(logits: Array, noise: Array | None, temperature: Array, sampler: Sampler, state: State) -> _Draw:
    """One token per row from logits `[B, V]`, -inf where barred; without Gumbel noise `[B, V]` the most probable."""
    own = None if sampler.temperature is None else sampler.temperature(logits, state, temperature)
    tau, score = temperature if own is None else own, logits
    if noise is not None:
        scaled = logits / (tau if own is None else own[:, None])
        score = scaled + noise
        if sampler.keep is not None:
            score = jnp.where(sampler.keep(scaled, state), score, -jnp.inf)
    token = jnp.argmax(score, axis=-1).astype(jnp.int32)
    log_prob = features.log_prob(logits, token, temperature=tau)
    return _Draw(token, log_prob, features.entropy(logits, temperature=tau), own)


def sample(
    policy: base.Policy,
    params: Any,
    prompts: Array,
    length: Array,
    row_id: Array,
    key: Array,
    *,
    num_generations: int,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    temperature: Array | float,
    vocab_mask: Array | None = None,
    greedy: bool = False,
    sampler: Sampler | None = None,
    sampler_state: State = (),
    budget: Array | None = None,
) -> Samples:
    """Draws `num_generations` responses to every prompt; pure and without jit: the caller compiles it.

    Token j of a row is `argmax(logits / temperature + Gumbel noise)` with the noise of
    `fold_in(fold_in(key, row_id), j)`, one-dimensional over the vocabulary, so neither the order of the rows nor
    padding changes a draw. The loop ends when every row has ended. B = P · `num_generations`.

    Args:
      policy: leaves of its cache have the row on axis 1.
      params: the policy's parameters.
      prompts: `[P, columns]` int32, right padded.
      length: `[P]` int32, tokens of each prompt, at least 1.
      row_id: `[B]` int32, unique in the rollout.
      key: consumed.
      num_generations: responses per prompt.
      max_new_tokens: response tokens a row may have, N.
      eos_id: the token that ends a response; may come first.
      pad_id: fills the columns after a response; a valid token.
      temperature: positive float32 scalar, traced; a sampler with a temperature rule may overrule it.
      vocab_mask: optional `[V]` bool, tokens that may be drawn.
      greedy: takes the most probable token instead; log-probabilities are still at the token's temperature.
      sampler: how tokens are drawn; None for `samplers.plain()`.
      sampler_state: the sampler's state, traced.
      budget: optional `[P]` int32, response tokens that the rows of each prompt may have, in [1, N]; None: N.

    Returns:
      The `Samples`.
    """
    chex.assert_rank([prompts, length, row_id], [2, 1, 1])
    base.require(num_generations >= 1, "num_generations", num_generations, "at least 1")
    base.require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    for name, token in (("eos_id", eos_id), ("pad_id", pad_id)):
        base.require(0 <= token < policy.vocab_size, name, token, f"in [0, {policy.vocab_size})")
    chex.assert_shape(row_id, (prompts.shape[0] * num_generations,))
    temperature, sampler = jnp.asarray(temperature, jnp.float32), sampler or plain()
    unembed = policy.unembed(params)
    row_key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_id)
    limit = None if budget is None else _repeat(budget, num_generations, 0)

    def ends(token: Array, num_tokens: Array | int) -> Array:
        return (token == eos_id) | (False if limit is None else num_tokens >= limit)

    def draw(hidden: Array, step: Array) -> _Draw:
        logits = jnp.einsum("bd,vd->bv", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32)
        logits = logits if vocab_mask is None else jnp.where(vocab_mask[None, :], logits, -jnp.inf)
        noise = None if greedy else _gumbel(row_key, step, policy.vocab_size)
        return _choose(logits, noise, temperature, sampler, sampler_state)

    def advance(state: _Loop) -> _Loop:
        token = jax.lax.dynamic_index_in_dim(state.drawn.token, state.step - 1, keepdims=False)
        hidden, cache = policy.decode(params, token, state.cache, row_length + state.step - 1)
        new = draw(hidden, state.step)
        drawn = jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, state.step, 0), state.drawn, new)
        num_tokens = jnp.where(state.ended, state.num_tokens, state.step + 1)
        return _Loop(state.step + 1, state.ended | ends(new.token, num_tokens), num_tokens, drawn, cache)

    hidden, cache = policy.prefill(params, prompts, prompts.shape[1] + max_new_tokens)
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    cache = jax.tree.map(lambda x: _repeat(x, num_generations, 1), cache)
    row_length = _repeat(length, num_generations, 0)
    first = draw(_repeat(last, num_generations, 0), jnp.int32(0))
    drawn = jax.tree.map(lambda x: jnp.pad(x[None], ((0, max_new_tokens - 1), (0, 0))), first)
    start = _Loop(jnp.int32(1), ends(first.token, 1), jnp.ones_like(row_length), drawn, cache)
    end = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~jnp.all(s.ended), advance, start)
    return _samples(_repeat(prompts, num_generations, 0), row_length, end, eos_id, pad_id, temperature)

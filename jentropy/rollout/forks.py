"""Rows that go on from a prefix: a prompt and the beginning of a response, as exact token ids.

The prefix is the sampler's prompt, so that a forked row has the scores of the same tokens sampled whole. Shapes are
fixed: every row has the T columns of the rollout it was forked from, however long its prefix is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jentropy.base import Array, Policy, Rollouts, State
from jentropy.rewards.base import TextReward
from jentropy.rollout.iid import RolloutSpec, grade
from jentropy.rollout.sampler import sample


class Prefixes(NamedTuple):
    """S states of a rollout of T columns to sample from.

    Attributes:
      tokens: `[S, T]` int32; only the first `length` columns are read.
      length: `[S]` int32, tokens of prompt and prefix, in [1, T - 1].
      prompt_length: `[S]` int32, tokens of the prompt alone.
      parent: `[S]` int32, `row_id` of the row that the prefix is the beginning of, -1 for a bare prompt.
      is_valid: `[S]` bool; rows of a state that is not have no token in the loss mask and `is_valid` False.
    """

    tokens: Array
    length: Array
    prompt_length: Array
    parent: Array
    is_valid: Array


def cut(rows: Rollouts, prompt_length: Array, column: Array, is_valid: Array) -> Prefixes:
    """The state of each row right before the token in a column was drawn.

    Args:
      rows: roots, B rows of T columns.
      prompt_length: `[B]` int32.
      column: `[B]` int32, of a response token. Where it is not in [`prompt_length`, T - 1] the state is not valid.
      is_valid: `[B]` bool, whether the state is wanted.

    Returns:
      B prefixes; their parents are the rows, or -1 where the column is the first of the response.
    """
    chex.assert_rank([prompt_length, column, is_valid], 1)
    last = rows.tokens.shape[1] - 1
    inside = (column >= prompt_length) & (column <= last)
    return Prefixes(
        tokens=rows.tokens,
        length=jnp.clip(column, 1, last),
        prompt_length=prompt_length,
        parent=jnp.where(column == prompt_length, -1, rows.row_id),
        is_valid=is_valid & inside,
    )


def response_columns(rows: Rollouts) -> Array:
    """`[B, T]` bool: the whole response of each row, what it took over (`row_data["prefix_length"]`) included."""
    column = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None, :]
    start = rows.fork - rows.row_data["prefix_length"] if "prefix_length" in rows.row_data else rows.fork
    taken = (column >= start[:, None]) & (column < rows.fork[:, None])
    return taken | rows.loss_mask


def continued_rollouts(
    policy: Policy,
    params: Any,
    prefixes: Prefixes,
    fields: Mapping[str, Array],
    key: Array,
    decode_state: State = (),
    *,
    spec: RolloutSpec,
    first_row: Array | int,
) -> tuple[Rollouts, Array]:
    """Samples `G` continuations of each prefix and grades the whole responses.

    Row `s * G + g` is the g-th continuation of state s; its group is s, its `row_id` is `first_row` more than its
    place, its randomness that of the `row_id`. A response, prefix included, has at most `spec.max_new_tokens` tokens.
    Only what was sampled here is in the loss mask. `row_data["prefix_length"]` `[B]` are the response tokens that were
    taken over. Columns of text rewards hold 0 until the host has graded them.

    Args:
      policy: the model.
      params: its parameters.
      prefixes: S states; see `Prefixes`.
      fields: `[S]` arrays by name, what the graders know of the prompt of each state.
      key: consumed; may be that of the roots if `first_row` is beyond theirs.
      decode_state: the sampler's state.
      spec: see `RolloutSpec`; nothing is made on demand.
      first_row: int32, more than every `row_id` there is.

    Returns:
      The rollouts, `B = S * G` rows of T columns; the entropy `[B, T]` of each sampled token, nats.
    """
    num_states, num_columns = prefixes.tokens.shape
    num_rows = num_states * spec.num_generations
    row_id = jnp.arange(num_rows, dtype=jnp.int32) + jnp.asarray(first_row, jnp.int32)
    left = prefixes.prompt_length + spec.max_new_tokens - prefixes.length
    is_valid = prefixes.is_valid & (left >= 1)
    samples = sample(
        policy, params, prefixes.tokens, prefixes.length, row_id, key,
        num_generations=spec.num_generations, max_new_tokens=spec.max_new_tokens, eos_id=spec.eos_id,
        pad_id=spec.pad_id, temperature=jnp.float32(spec.temperature), greedy=spec.greedy, sampler=spec.sampler,
        sampler_state=decode_state, budget=jnp.clip(left, 1, spec.max_new_tokens),
    )  # fmt: skip
    samples = jax.tree.map(lambda x: x[:, :num_columns] if x.ndim == 2 else x, samples)
    per_row = jax.tree.map(lambda x: jnp.repeat(x, spec.num_generations, axis=0), (prefixes, is_valid, dict(fields)))
    states, is_valid, fields = per_row
    column = jnp.arange(num_columns, dtype=jnp.int32)[None, :]
    taken = (column >= states.prompt_length[:, None]) & (column < states.length[:, None])
    columns = grade(spec, samples.tokens, samples.response_mask | taken, fields)
    row_data = {
        "truncated": samples.truncated & is_valid,
        "is_valid": is_valid,
        "prefix_length": states.length - states.prompt_length,
    }
    if len(spec.rewards) > 1 and any(isinstance(reward, TextReward) for reward in spec.rewards):
        row_data["reward_is_valid"] = jnp.repeat(is_valid[:, None], len(spec.rewards), axis=1)
    rollouts = Rollouts(
        tokens=samples.tokens,
        loss_mask=samples.response_mask & is_valid[:, None],
        logp_sampler=samples.log_prob,
        logp_old=samples.log_prob,
        rewards=jnp.stack(columns, axis=1).astype(jnp.float32),
        row_id=row_id,
        group=jnp.arange(num_rows, dtype=jnp.int32) // spec.num_generations,
        parent=states.parent,
        fork=states.length,
        token_data={} if samples.temperature is None else {"temperature": samples.temperature},
        row_data=row_data,
    )
    return rollouts, samples.entropy

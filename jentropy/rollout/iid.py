"""Independent groups: every prompt is answered `num_generations` times from the same state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jentropy.base import Array, Policy, Rollouts, State
from jentropy.rewards.answers import AnswerId
from jentropy.rewards.base import DeviceReward, TextReward
from jentropy.rollout.sampler import sample
from jentropy.samplers import Sampler, plain

ON_DEMAND = frozenset({"answer_id", "greedy_reward"})
"""Entries of `row_data` that rollouts hold only where a method requires them."""

GREEDY_TOKENS = "greedy_tokens"
"""Entry of `token_data` that text rewards are still to grade: `[B, T]` int32, -1 outside the greedy response."""


class RolloutSpec(NamedTuple):
    """What is compiled into a sampler.

    Attributes:
      num_generations: responses per prompt, G.
      max_new_tokens: largest response, tokens.
      eos_id, pad_id: ids that end a response and fill a row.
      temperature: divides the logits.
      rewards: all reward functions in column order; text rewards are filled in on the host.
      greedy: take the most likely token instead of sampling.
      sampler: how tokens are drawn; its numbers are not compiled in.
      required: which of `ON_DEMAND` the rows shall hold; other names are ignored.
      answer_id: what makes `answer_id`; None leaves -1, to be filled in on the host.
    """

    num_generations: int
    max_new_tokens: int
    eos_id: int
    pad_id: int
    temperature: float
    rewards: tuple[DeviceReward | TextReward, ...]
    greedy: bool = False
    sampler: Sampler = plain()
    required: frozenset[str] = frozenset()
    answer_id: AnswerId | None = None


def grade(spec: RolloutSpec, tokens: Array, response_mask: Array, fields: Mapping[str, Array]) -> list[Array]:
    """The reward columns `[B]`; those of text rewards hold 0."""
    return [
        reward.function(tokens, response_mask, fields).astype(jnp.float32)
        if isinstance(reward, DeviceReward)
        else jnp.zeros(tokens.shape[:1], jnp.float32)
        for reward in spec.rewards
    ]


def _greedy(
    policy: Policy, params: Any, prompts: Array, length: Array, fields: Mapping[str, Array], key: Array,
    spec: RolloutSpec,
) -> tuple[Array, Array]:  # fmt: skip
    """The weighted reward `[P]` of the greedy response to each prompt, and its tokens `[P, T]`, -1 outside."""
    row_id = jnp.arange(prompts.shape[0], dtype=jnp.int32)
    samples = sample(
        policy, params, prompts, length, row_id, key, num_generations=1, max_new_tokens=spec.max_new_tokens,
        eos_id=spec.eos_id, pad_id=spec.pad_id, temperature=jnp.float32(spec.temperature), greedy=True,
    )  # fmt: skip
    columns = grade(spec, samples.tokens, samples.response_mask, fields)
    weighted = [reward.weight * column for reward, column in zip(spec.rewards, columns)]
    return jnp.stack(weighted, axis=1).sum(axis=1), jnp.where(samples.response_mask, samples.tokens, -1)


def iid_rollouts(
    policy: Policy,
    params: Any,
    prompts: Array,
    length: Array,
    fields: Mapping[str, Array],
    key: Array,
    decode_state: State = (),
    *,
    spec: RolloutSpec,
) -> tuple[Rollouts, Array]:
    """Samples `G` responses for each of P prompts and grades what can be graded on the device.

    Row `p * G + g` is the g-th response to prompt p; its group is p. `logp_old` is the sampler's until the trainer
    has scored the rows. Columns of text rewards hold 0, and so does their part of `row_data["greedy_reward"]`: the
    greedy responses are in `token_data["greedy_tokens"]` then. `token_data["temperature"]` is there if the sampler has
    a temperature rule.

    Args:
      policy: the model.
      params: its parameters.
      prompts: `[P, L]` int32, right padded.
      length: `[P]` int32, tokens in each prompt.
      fields: `[P]` arrays by name, what the graders know of each prompt.
      key: consumed.
      decode_state: the sampler's state.
      spec: see `RolloutSpec`.

    Returns:
      The rollouts, `B = P * G` rows of `T = L + max_new_tokens` columns; the entropy `[B, T]` of each sampled token's
      distribution at the sampling temperature, nats.
    """
    row_id = jnp.arange(prompts.shape[0] * spec.num_generations, dtype=jnp.int32)
    samples = sample(
        policy, params, prompts, length, row_id, key,
        num_generations=spec.num_generations, max_new_tokens=spec.max_new_tokens, eos_id=spec.eos_id,
        pad_id=spec.pad_id, temperature=jnp.float32(spec.temperature), greedy=spec.greedy,
        sampler=spec.sampler, sampler_state=decode_state,
    )  # fmt: skip
    per_row = {name: jnp.repeat(value, spec.num_generations, axis=0) for name, value in fields.items()}
    columns = grade(spec, samples.tokens, samples.response_mask, per_row)
    token_data = {} if samples.temperature is None else {"temperature": samples.temperature}
    row_data = {"truncated": samples.truncated, "is_valid": jnp.ones(row_id.shape, bool)}
    if len(spec.rewards) > 1 and any(isinstance(reward, TextReward) for reward in spec.rewards):
        row_data["reward_is_valid"] = jnp.ones((len(row_id), len(spec.rewards)), bool)
    if "answer_id" in spec.required:
        none = jnp.full_like(row_id, -1)
        found = spec.answer_id(samples.tokens, samples.response_mask, per_row) if spec.answer_id else none
        row_data["answer_id"] = found
    if "greedy_reward" in spec.required:
        found = _greedy(policy, params, prompts, length, fields, key, spec)
        reward, tokens = (jnp.repeat(x, spec.num_generations, axis=0) for x in found)
        row_data["greedy_reward"] = reward
        if any(isinstance(grader, TextReward) for grader in spec.rewards):
            token_data[GREEDY_TOKENS] = tokens
    rollouts = Rollouts(
        tokens=samples.tokens,
        loss_mask=samples.response_mask,
        logp_sampler=samples.log_prob,
        logp_old=samples.log_prob,
        rewards=jnp.stack(columns, axis=1).astype(jnp.float32),
        row_id=row_id,
        group=row_id // spec.num_generations,
        parent=jnp.full_like(row_id, -1),
        fork=jnp.repeat(length, spec.num_generations, axis=0),
        token_data=token_data,
        row_data=row_data,
    )
    return rollouts, samples.entropy

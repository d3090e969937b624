"""Independent groups: every prompt is answered `num_generations` times from the same state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jentropy.base import Array, Policy, Rollouts
from jentropy.rewards.base import DeviceReward, TextReward
from jentropy.rollout.sampler import sample


class RolloutSpec(NamedTuple):
    """What is compiled into a sampler.

    Attributes:
      num_generations: responses per prompt, G.
      max_new_tokens: largest response, tokens.
      eos_id, pad_id: ids that end a response and fill a row.
      temperature: divides the logits.
      rewards: all reward functions in column order; text rewards are filled in on the host.
      greedy: take the most likely token instead of sampling.
    """

    num_generations: int
    max_new_tokens: int
    eos_id: int
    pad_id: int
    temperature: float
    rewards: tuple[DeviceReward | TextReward, ...]
    greedy: bool = False


def iid_rollouts(
    policy: Policy,
    params: Any,
    prompts: Array,
    length: Array,
    fields: Mapping[str, Array],
    key: Array,
    *,
    spec: RolloutSpec,
) -> tuple[Rollouts, Array]:
    """Samples `G` responses for each of P prompts and grades what can be graded on the device.

    Row `p * G + g` is the g-th response to prompt p; its group is p. `logp_old` is the sampler's until the trainer
    has scored the rows. Columns of text rewards hold 0.

    Args:
      policy: the model.
      params: its parameters.
      prompts: `[P, L]` int32, right padded.
      length: `[P]` int32, tokens in each prompt.
      fields: `[P]` arrays by name, what the graders know of each prompt.
      key: consumed.
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
    )  # fmt: skip
    per_row = {name: jnp.repeat(value, spec.num_generations, axis=0) for name, value in fields.items()}
    columns = [
        reward.function(samples.tokens, samples.response_mask, per_row)
        if isinstance(reward, DeviceReward)
        else jnp.zeros(row_id.shape, jnp.float32)
        for reward in spec.rewards
    ]
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
        row_data={"truncated": samples.truncated, "is_valid": jnp.ones(row_id.shape, bool)},
    )
    return rollouts, samples.entropy

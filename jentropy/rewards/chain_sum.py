"""Graders of chained addition (`data/chain_sum.py`): the digit right before the first end of sequence is the answer.

A response without an end, or with fewer than two tokens before it, scores 0. The steps are not checked. Both graders
give the same rewards.
"""

from collections.abc import Mapping

import chex
import jax.numpy as jnp

from jentropy.base import Array
from jentropy.data.tokenizer import CHAIN_SUM
from jentropy.rewards.base import DeviceReward, TextReward


def correct_tokens(tokens: Array, response_mask: Array, fields: Mapping[str, Array]) -> Array:
    """1 where the last digit before the first end of sequence equals the answer, else 0.

    Args:
      tokens: `[B, T]` int32.
      response_mask: `[B, T]` bool, contiguous in each row; tokens outside are ignored.
      fields: `answer` `[B]` int32 in 0..9.

    Returns:
      `[B]` float32.
    """
    chex.assert_rank([tokens, response_mask, fields["answer"]], [2, 2, 1])
    chex.assert_equal_shape([tokens, response_mask])
    is_end = response_mask & (tokens == CHAIN_SUM.eos_id)
    end = jnp.argmax(is_end, axis=1)
    index = end - jnp.argmax(response_mask, axis=1)
    digit = jnp.take_along_axis(tokens, jnp.maximum(end - 1, 0)[:, None], axis=1)[:, 0]
    is_correct = is_end.any(axis=1) & (index >= 2) & (digit == fields["answer"])
    return is_correct.astype(jnp.float32)


def correct_text(prompts: list[str], completions: list[str], *, answer: list[int], **fields: list) -> list[float]:
    """The same of texts: one character per token, `|` ends a response."""
    del prompts, fields
    ends = [completion.find(CHAIN_SUM.eos) for completion in completions]
    return [
        float(end >= 2 and completion[end - 1] == str(right))
        for completion, end, right in zip(completions, ends, answer)
    ]


DEVICE_REWARD = DeviceReward("chain_sum", correct_tokens)
TEXT_REWARD = TextReward("chain_sum", correct_text)

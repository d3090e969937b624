"""Graders of chained addition (`data/chain_sum.py`), each for token arrays and, with the same rewards, for text.

Correct: the digit right before the first end of sequence is the answer. A response without an end, or with fewer than
two tokens before it, scores 0. The steps are not checked.

Legal chain: the response to n digits is `S`, n - 1 digits and the end, nothing less or more, and every digit before the
last is the right running sum. The last one is the answer, which is the other grader's affair: so either reward may be
had without the other, a right guess without the chain (1, 0) and a chain that slips at its end (0, 1). For n = 2 there
is no step before the answer.
"""

import itertools
import re
from collections.abc import Mapping

import chex
import jax.numpy as jnp

from jentropy.base import Array
from jentropy.data.tokenizer import CHAIN_SUM, CHAIN_SUM_EXITS
from jentropy.rewards.base import DeviceReward, TextReward

_STEPS = int(CHAIN_SUM.encode("S")[0])
_EXIT = int(CHAIN_SUM_EXITS.encode("X")[0])
_LONGEST = 7  # tokens of the longest legal chain, that of six digits


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


def exit_tokens(tokens: Array, response_mask: Array, fields: Mapping[str, Array]) -> Array:
    """`correct_tokens` where the exit token stands before the answer, else 0: see `data/chain_sum.py`."""
    end = jnp.argmax(response_mask & (tokens == CHAIN_SUM.eos_id), axis=1)
    before = jnp.maximum(end - 2, 0)[:, None]
    token, inside = (jnp.take_along_axis(x, before, axis=1)[:, 0] for x in (tokens, response_mask))
    return jnp.where((token == _EXIT) & inside, correct_tokens(tokens, response_mask, fields), 0.0)


def exit_text(prompts: list[str], completions: list[str], *, answer: list[int], **fields: list) -> list[float]:
    """The same of texts, in which `X` is the exit token."""
    ends = [completion.find(CHAIN_SUM.eos) for completion in completions]
    correct = correct_text(prompts, completions, answer=answer, **fields)
    return [
        value * (end >= 2 and completion[end - 2] == "X") for value, end, completion in zip(correct, ends, completions)
    ]


def legal_chain_tokens(tokens: Array, response_mask: Array, fields: Mapping[str, Array]) -> Array:
    """1 where the response is a legal chain, else 0.

    Args:
      tokens: `[B, T]` int32; the digits of the prompt stand in the first columns.
      response_mask: `[B, T]` bool, contiguous in each row; of other columns only the prompt's digits are read.
      fields: `num_digits` `[B]` int32, in 2..6.

    Returns:
      `[B]` float32.
    """
    num_digits = fields["num_digits"][:, None]
    chex.assert_rank([tokens, response_mask, num_digits], 2)
    chex.assert_equal_shape([tokens, response_mask])
    place = jnp.arange(_LONGEST, dtype=jnp.int32)[None, :]
    column = jnp.argmax(response_mask, axis=1).astype(jnp.int32)[:, None] + place
    there, column = column < tokens.shape[1], jnp.minimum(column, tokens.shape[1] - 1)
    there &= jnp.take_along_axis(response_mask, column, axis=1)
    token = jnp.take_along_axis(tokens, column, axis=1)
    digits = jnp.where(place < num_digits, tokens[:, :_LONGEST], 0)
    right = jnp.cumsum(digits, axis=1, dtype=digits.dtype) % 10  # at k the sum of the first k + 1 digits
    right = jnp.where(place == 0, _STEPS, jnp.where(place == num_digits, CHAIN_SUM.eos_id, right))
    is_digit = (token >= 0) & (token <= 9)
    fits = there & jnp.where(place == num_digits - 1, is_digit, token == right)
    return jnp.all(fits | (place > num_digits), axis=1).astype(jnp.float32)


def legal_chain_text(
    prompts: list[str], completions: list[str], *, num_digits: list[int], **fields: list
) -> list[float]:
    """The same of texts: one character per token, `|` ends a response."""
    del fields
    return [
        float(bool(re.match(rf"S{_steps(prompt[:n])}[0-9]{re.escape(CHAIN_SUM.eos)}", completion)))
        for prompt, completion, n in zip(prompts, completions, num_digits)
    ]


def _steps(digits: str) -> str:
    """The running sums of all digits but the first and the last; of `"345"` that is `"7"`."""
    sums = itertools.accumulate(int(digit) for digit in digits)
    return "".join(str(value % 10) for value in sums)[1:-1]


DEVICE_REWARD = DeviceReward("chain_sum", correct_tokens)
TEXT_REWARD = TextReward("chain_sum", correct_text)
EXIT_DEVICE_REWARD = DeviceReward("chain_sum", exit_tokens)
EXIT_TEXT_REWARD = TextReward("chain_sum", exit_text)
LEGAL_DEVICE_REWARD = DeviceReward("legal_chain", legal_chain_tokens)
LEGAL_TEXT_REWARD = TextReward("legal_chain", legal_chain_text)

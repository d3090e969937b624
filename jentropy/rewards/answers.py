"""The answer of a response as a number: responses of one prompt with equal answers have equal ids, those of none -1."""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

import chex
import jax.numpy as jnp
import numpy as np

from jentropy.base import Array
from jentropy.data.tokenizer import CHAIN_SUM

AnswerId: TypeAlias = Callable[[Array, Array, Mapping[str, Array]], Array]
"""(tokens `[B, T]`, response mask `[B, T]`, fields `[B]` by name) -> `[B]` int32; runs on the device."""

_MARKER = re.compile(r"####|\banswer(?:\s+is)?\b", re.IGNORECASE)
_AROUND = " \t:=.,;*$"


def chain_sum_id(tokens: Array, response_mask: Array, fields: Mapping[str, Array]) -> Array:
    """Of chained addition: the digit right before the first end of sequence; -1 if no digit of the response is there.

    Args:
      tokens: `[B, T]` int32.
      response_mask: `[B, T]` bool, contiguous in each row; tokens outside are ignored.
      fields: not used.

    Returns:
      `[B]` int32.
    """
    del fields
    chex.assert_rank([tokens, response_mask], 2)
    is_end = response_mask & (tokens == CHAIN_SUM.eos_id)
    before = jnp.maximum(jnp.argmax(is_end, axis=1) - 1, 0)[:, None]
    digit, inside = (jnp.take_along_axis(x, before, axis=1)[:, 0] for x in (tokens, response_mask))
    return jnp.where(is_end.any(axis=1) & inside & (digit < 10), digit, -1).astype(jnp.int32)


def final_answer(completion: str) -> str:
    """The final answer of a text: what follows its last "####", "answer" or "answer is"; else its last line.

    Of what follows, the first line that is not empty counts. Case, white space and the signs `:=.,;*$` around the
    answer are dropped.

    >>> final_answer("6 * 7 is 42. The answer is: 42.")
    '42'
    """
    markers = list(_MARKER.finditer(completion))
    rest = completion[markers[-1].end() :] if markers else completion
    lines = [line for line in (line.strip(_AROUND) for line in rest.splitlines()) if line]
    if not lines:
        return ""
    return " ".join(lines[0 if markers else -1].casefold().split())


def answer_ids(answers: list[str]) -> np.ndarray:
    """Ids `[B]` int32 of answers, -1 for an empty one: 31 bits of their SHA-256, whatever the other rows are.

    Two different answers have the same id with probability 2⁻³¹.
    """

    def number(answer: str) -> int:
        return int.from_bytes(hashlib.sha256(answer.encode()).digest()[:4]) >> 1 if answer else -1

    return np.asarray([number(answer) for answer in answers], np.int32)

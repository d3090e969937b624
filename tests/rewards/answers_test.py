"""Answers of responses as numbers."""

import jax
import numpy as np
import pytest

from jentropy.data.tokenizer import CHAIN_SUM
from jentropy.rewards.answers import answer_ids, chain_sum_id, final_answer


def rows(*texts):
    """Tokens and response mask; "12____=" is the prompt, and the response ends where the text does."""
    tokens = np.stack([CHAIN_SUM.encode(f"12____={text:_<7}") for text in texts])
    column = np.arange(tokens.shape[1])[None, :]
    return tokens, (column >= 7) & (column < 7 + np.array([[len(text)] for text in texts]))


def test_the_answer_of_chained_addition_is_the_digit_before_the_first_end():
    texts = ["D3|", "S345|", "S3", "S345678", "|", "3|", "DS|", "D|", "D=|", "0|"]
    wanted = [3, 5, -1, -1, -1, 3, -1, -1, -1, 0]
    found = jax.jit(chain_sum_id)(*rows(*texts), {})
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.int32


def test_what_stands_outside_the_response_does_not_matter():
    tokens, mask = rows("D3|", "D")
    tokens[:, 10:] = CHAIN_SUM.encode("7|7|")
    np.testing.assert_array_equal(chain_sum_id(tokens, mask, {}), [3, -1])


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("6 * 7\n#### 42", "42"),
        ("#### 41\nno\n####  42 \n", "42"),
        ("The answer is 41. No, the Answer is: 42.", "42"),
        ("Answer: $42$\nI hope this helps.", "42"),
        ("answer\n\n  Forty   Two ", "forty two"),
        ("first\n42\n\n", "42"),
        ("the answers vary: 42", "the answers vary: 42"),
        ("so the final answer is", ""),
        ("  \n ", ""),
        ("", ""),
    ],
)
def test_the_final_answer_of_a_text(completion, answer):
    assert final_answer(completion) == answer


def test_equal_answers_have_equal_ids_whatever_stands_beside_them():
    ids = answer_ids(["42", "", "7", "42", "b"])
    assert ids.dtype == np.int32 and ids[1] == -1
    assert ids[0] == ids[3] and len(set(ids.tolist())) == 4 and ids[[0, 2, 4]].min() >= 0
    np.testing.assert_array_equal(answer_ids(["7", "42"]), ids[[2, 0]])
    assert answer_ids([]).shape == (0,)

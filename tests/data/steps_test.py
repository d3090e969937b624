"""Where steps begin, on texts that say it by hand."""

import numpy as np
import pytest

from jentropy.data.steps import AfterText, EveryToken, step_ids
from jentropy.data.task import chain_sum_task
from jentropy.data.tokenizer import char_tokenizer

TOKENIZER = char_tokenizer(["ab \n"])


def steps(texts, rule=None, start=1):
    """The steps of texts behind a prompt of `start` tokens, `|` for the end; as text, `.` for -1."""
    width = start + max(map(len, texts)) + 1
    tokens, mask = np.full((len(texts), width), TOKENIZER.pad_id), np.zeros((len(texts), width), bool)
    for row, text in enumerate(texts):
        ids = [TOKENIZER.eos_id if letter == "|" else TOKENIZER.encode(letter)[0] for letter in text]
        tokens[row, start : start + len(ids)], mask[row, start : start + len(ids)] = ids, True
    found = step_ids((rule or AfterText(TOKENIZER))(tokens, mask), mask)
    assert found.dtype == np.int32 and (found[~mask] == -1).all()
    return ["".join(map(str, row[start : start + len(text)])) for row, text in zip(found, texts)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ab|", "000"),
        ("a\nb|", "0011"),
        ("ab\nba\nab|", "000111222"),
        ("a\n\n\nb|", "000011"),
        ("a\n  b|", "000011"),
        ("a\n|", "000"),
        ("\n\na\nb|", "000011"),
        ("\n\n|", "000"),
        ("|", "0"),
        ("", ""),
    ],
)
def test_a_step_begins_after_a_newline(text, wanted):
    assert steps([text]) == [wanted]
    assert steps(["b\nb", text], start=3) == ["001", wanted]


def test_a_newline_in_the_prompt_begins_no_step():
    tokens = TOKENIZER.encode("a\nab\na")[None, :]
    mask = np.array([[0, 0, 1, 1, 1, 1]], bool)
    assert step_ids(AfterText(TOKENIZER)(tokens, mask), mask).tolist() == [[-1, -1, 0, 0, 0, 1]]


def test_another_text():
    assert steps(["ab ab|"], AfterText(TOKENIZER, "b")) == ["000111"]
    with pytest.raises(ValueError, match="text must be not empty"):
        AfterText(TOKENIZER, "")


def test_of_a_chain_every_token_is_a_step_but_its_end():
    task = chain_sum_task()
    tokens = task.tokenizer.encode("12____=S3|__")[None, :]
    mask = np.array([[0] * 7 + [1] * 3 + [0] * 2], bool)
    assert step_ids(task.step_boundary(tokens, mask), mask)[0, 7:].tolist() == [0, 1, 1, -1, -1]
    assert step_ids(EveryToken(15)(tokens[:, 9:], mask[:, 9:]), mask[:, 9:]).tolist() == [[0, -1, -1]]

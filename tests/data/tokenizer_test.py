"""Character tokenizers: ids, round trip, errors that name the place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy.data.tokenizer import CHAIN_SUM, CharTokenizer


def test_ids_of_chained_addition():
    assert (CHAIN_SUM.vocab_size, CHAIN_SUM.pad_id, CHAIN_SUM.eos_id) == (16, 10, 15)
    np.testing.assert_array_equal(CHAIN_SUM.encode("12____="), [1, 2, 10, 10, 10, 10, 11])
    np.testing.assert_array_equal(CHAIN_SUM.encode("DSP|"), [12, 13, 14, 15])
    assert CHAIN_SUM.encode("").dtype == np.int32
    assert CHAIN_SUM == CharTokenizer(alphabet="0123456789_=DSP|", pad="_", eos="|")
    assert len({CHAIN_SUM, CharTokenizer(alphabet="0123456789_=DSP|", pad="_", eos="|")}) == 1


@given(st.lists(st.integers(0, 15), max_size=20), st.text(CHAIN_SUM.alphabet, max_size=20))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_round_trip(tokens, text):
    np.testing.assert_array_equal(CHAIN_SUM.encode(CHAIN_SUM.decode(tokens)), np.asarray(tokens, np.int32))
    assert CHAIN_SUM.decode(CHAIN_SUM.encode(text)) == text


def test_masked_rows():
    tokens = np.array([[1, 2, 15], [99, 13, 15]])
    assert CHAIN_SUM.decode_rows(tokens, np.array([[True, True, True], [False, True, False]])) == ["12|", "S"]


def test_unknown_character_and_token():
    with pytest.raises(ValueError, match="character 'x' at position 2 is not in"):
        CHAIN_SUM.encode("12x4y")
    with pytest.raises(ValueError, match=r"token 16 at position 1 is not in \[0, 16\)"):
        CHAIN_SUM.decode([3, 16])
    with pytest.raises(ValueError, match="token -1 at position 0"):
        CHAIN_SUM.decode([-1])


@pytest.mark.parametrize(
    "alphabet, pad, eos, message",
    [("aa", "a", "a", "distinct"), ("ab", "c", "a", "pad must be"), ("ab", "a", "ab", "eos must be")],
)
def test_bad_alphabet(alphabet, pad, eos, message):
    with pytest.raises(ValueError, match=message):
        CharTokenizer(alphabet=alphabet, pad=pad, eos=eos)

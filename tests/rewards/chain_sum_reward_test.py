"""The graders of chained addition for tokens and for text agree on any tokens; what text graders return is checked."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy.data import chain_sum as chain_sum_data
from jentropy.data.tokenizer import CHAIN_SUM
from jentropy.rewards import base, chain_sum

_grade = jax.jit(chain_sum.DEVICE_REWARD.function)


def _both(tokens, mask, answer) -> tuple[np.ndarray, np.ndarray]:
    """Rewards `[B]` by the device grader and by the text grader."""
    fields = {"answer": np.asarray(answer, np.int32)}
    on_device = np.asarray(_grade(tokens, mask, fields))
    texts = CHAIN_SUM.decode_rows(tokens, mask)
    on_host, is_valid = base.grade_text(chain_sum.TEXT_REWARD, [""] * len(texts), texts, fields)
    assert is_valid.all() and on_host.dtype == on_device.dtype == np.float32
    return on_device, on_host


@pytest.mark.parametrize(
    "response, reward",
    [
        ("D7|", 1), ("S347|", 1), ("S997|", 1), ("P7|", 1),
        ("D6|", 0), ("7|", 0), ("|", 0), ("D7", 0), ("D|7|", 0), ("D7_|", 0), ("D7|6|", 1), ("77|", 1), ("D=|", 0),
    ],
)  # fmt: skip
def test_by_hand(response, reward):
    tokens = CHAIN_SUM.encode(("34____=" + response).ljust(14, "_"))[None]
    mask = (np.arange(14) >= 7)[None]
    on_device, on_host = _both(tokens, mask, [7])
    assert on_device == on_host == reward


def test_both_graders_agree_on_random_responses():
    rng = np.random.default_rng(0)
    tokens = rng.choice([1, 2, 12, 15], (500, 14)).astype(np.int32)
    start, length = rng.integers(0, 7, 500), rng.integers(0, 8, 500)
    column = np.arange(14)
    mask = (column >= start[:, None]) & (column < (start + length)[:, None])
    on_device, on_host = _both(tokens, mask, rng.integers(1, 3, 500))
    np.testing.assert_array_equal(on_device, on_host)
    assert 25 < on_device.sum() < 475


@given(st.lists(st.integers(0, 15), min_size=9, max_size=9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_both_graders_agree(row, start, stop, answer):
    column = np.arange(9)
    mask = ((column >= start) & (column < stop))[None]
    on_device, on_host = _both(np.asarray([row], np.int32), mask, [answer])
    assert on_device == on_host


def test_masked_tokens_have_no_influence():
    tokens = CHAIN_SUM.encode("D5|====D7|").reshape(1, -1)
    mask = (np.arange(10) >= 7)[None]
    assert _both(tokens, mask, [7]) == (1, 1)
    assert _both(np.where(mask, tokens, 99), mask, [7]) == (1, 1)


_grade_chain = jax.jit(chain_sum.LEGAL_DEVICE_REWARD.function)


def _legal(tokens, mask, num_digits) -> np.ndarray:
    """Rewards `[B]` for legal chains, on which both graders agree; the prompt is the first 7 columns."""
    fields = {"num_digits": np.asarray(num_digits, np.int32)}
    on_device = np.asarray(_grade_chain(tokens, mask, fields))
    prompts = CHAIN_SUM.decode_rows(tokens[:, :7], np.ones((len(tokens), 7), bool))
    texts = CHAIN_SUM.decode_rows(tokens, mask)
    on_host, is_valid = base.grade_text(chain_sum.LEGAL_TEXT_REWARD, prompts, texts, fields)
    assert is_valid.all() and on_host.dtype == on_device.dtype == np.float32
    np.testing.assert_array_equal(on_device, on_host)
    return on_device


@pytest.mark.parametrize(
    "prompt, response, reward",
    [
        ("345", "S72|", 1), ("345", "S79|", 1), ("345", "S82|", 0), ("345", "P72|", 0), ("345", "D2|", 0),
        ("345", "S72", 0), ("345", "S7|", 0), ("345", "S720|", 0), ("345", "S7D|", 0), ("345", "S72|5|", 1),
        ("345", "|S72|", 0), ("345", "SS72|", 0), ("345", "S7_|", 0), ("345", "", 0), ("345", "372|", 0),
        ("89", "S7|", 1), ("89", "S0|", 1), ("89", "S|", 0), ("89", "D7|", 0),
        ("999999", "S87654|", 1), ("999999", "S87650|", 1), ("999999", "S87754|", 0), ("123456", "S36051|", 1),
        ("123456", "S36051", 0), ("123456", "S360511", 0),
    ],
)  # fmt: skip
def test_legal_chains_by_hand(prompt, response, reward):
    tokens = CHAIN_SUM.encode((prompt.ljust(6, "_") + "=" + response).ljust(14, "_"))[None]
    mask = ((np.arange(14) >= 7) & (np.arange(14) < 7 + len(response)))[None]
    assert _legal(tokens, mask, [len(prompt)]) == reward
    wide = np.concatenate([tokens[:, :7], np.full((1, 2), CHAIN_SUM.pad_id, np.int32), tokens[:, 7:]], axis=1)
    wide_mask = np.concatenate([mask[:, :7], np.zeros((1, 2), bool), mask[:, 7:]], axis=1)
    assert _legal(wide, wide_mask, [len(prompt)]) == reward


@pytest.mark.parametrize("num_digits", range(2, 7))
def test_legal_chains_of_demonstrations(num_digits):
    """Chains without noise are legal and correct; noise in a step or in the answer costs the one or the other."""
    rng = np.random.default_rng(num_digits)
    digits = rng.integers(0, 10, (400, num_digits))
    prompt, shown = chain_sum_data.encode_prompts(digits), chain_sum_data.demonstrate(digits, rng)
    tokens = np.concatenate([prompt["prompt"], shown["response"]], axis=1)
    mask = np.concatenate([np.zeros((400, 7), bool), np.arange(7) < shown["response_length"][:, None]], axis=1)
    legal = _legal(tokens, mask, prompt["num_digits"])
    sums = digits.cumsum(axis=1) % 10
    steps_right = (shown["response"][:, 1 : num_digits - 1] == sums[:, 1:-1]).all(axis=1)
    np.testing.assert_array_equal(legal, (shown["strategy"] == 1) & steps_right)
    correct = _both(tokens, mask, prompt["answer"])[0]
    combinations = {(int(x), int(y)) for x, y in zip(correct, legal)}
    assert combinations >= {(1, 1), (1, 0), (0, 1), (0, 0)}


def test_legal_chain_graders_agree_on_random_responses():
    rng = np.random.default_rng(0)
    tokens = rng.choice([0, 0, 0, 1, 13, 15], (2000, 14)).astype(np.int32)
    tokens[:, :6] = rng.integers(0, 2, (2000, 6))
    tokens[:, 7] = CHAIN_SUM.encode("S")[0]
    mask = (np.arange(14) >= 7) & (np.arange(14) < 7 + rng.integers(0, 8, 2000)[:, None])
    legal = _legal(tokens, mask, rng.integers(2, 7, 2000))
    assert 20 < legal.sum() < 1980


def test_only_the_prompt_and_the_response_are_read():
    tokens = CHAIN_SUM.encode("345___=S72|S99")[None]
    mask = ((np.arange(14) >= 7) & (np.arange(14) < 11))[None]
    spoilt = np.where(mask | (np.arange(14) < 3), tokens, 99)
    assert _grade_chain(tokens, mask, {"num_digits": np.array([3], np.int32)}) == 1
    assert _grade_chain(spoilt, mask, {"num_digits": np.array([3], np.int32)}) == 1


def _reward(function) -> base.TextReward:
    return base.TextReward("mine", function)


def test_text_graders_may_abstain():
    reward = _reward(lambda prompts, completions, label: [None, True, np.float32(0.5), label[3]])
    values, is_valid = base.grade_text(reward, [""] * 4, [""] * 4, {"label": np.arange(4)})
    np.testing.assert_array_equal(values, np.asarray([0, 1, 0.5, 3], np.float32))
    np.testing.assert_array_equal(is_valid, [False, True, True, True])


def test_text_graders_get_plain_lists():
    def check(prompts, completions, label):
        assert type(label) is list and type(label[0]) is int
        return [0.0] * len(completions)

    base.grade_text(_reward(check), ["a"], ["b"], {"label": np.asarray([3], np.int32)})


@pytest.mark.parametrize(
    "returned, error, message",
    [
        ([1.0], ValueError, "reward 'mine' returned 1 values for 2 rows"),
        ([1.0, float("nan")], ValueError, "reward 'mine' returned nan for row 1"),
        ([float("-inf"), 0.0], ValueError, "reward 'mine' returned -inf for row 0"),
        ([0.0, 1e39], ValueError, r"reward 'mine' returned 1e\+39 for row 1, not finite in float32"),
        ([0.0, "1"], TypeError, "reward 'mine' returned str '1' for row 1"),
        ([[0.0], 1.0], TypeError, "reward 'mine' returned list .* for row 0"),
        (1.0, TypeError, "reward 'mine' must return a list, got float"),
        (None, TypeError, "reward 'mine' must return a list, got NoneType"),
        ("11", TypeError, "reward 'mine' must return a list, got str"),
    ],
)
def test_bad_results_of_text_graders(returned, error, message):
    with pytest.raises(error, match=message):
        base.grade_text(_reward(lambda prompts, completions: returned), ["", ""], ["", ""], {})


def test_rewards_are_values():
    assert base.DeviceReward("a", chain_sum.correct_tokens) == base.DeviceReward("a", chain_sum.correct_tokens)
    assert hash(base.TextReward("a", len, 2.0)) == hash(base.TextReward("a", len, 2.0))
    with pytest.raises(ValueError, match="weight must be finite, got inf"):
        base.TextReward("a", len, weight=float("inf"))

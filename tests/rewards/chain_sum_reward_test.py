"""Both graders of chained addition agree on any tokens; what text graders return is checked."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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

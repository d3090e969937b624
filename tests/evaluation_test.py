"""Evaluation metrics against the released code's outputs, exact fractions and enumeration."""

import itertools
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from jentropy.evaluation import bootstrap_interval, maj_at_k, mean_at_n, pass_at_k, percentile_interval

GOLDEN = Path(os.environ.get("JENTROPY_GOLDEN", Path(__file__).parent / "golden")) / "base_passk.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def test_pass_at_k_equals_the_released_code(golden):
    n, c, k = (golden[name].astype(int) for name in ("n", "c", "k"))
    np.testing.assert_allclose(pass_at_k(n, c, k), golden["pass_at_k"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(pass_at_k(n, c, k), golden["exact"], rtol=0, atol=1e-12)


def test_pass_at_k_refuses_k_above_n_where_the_released_code_returns_one(golden):
    for n, c, k, released in golden["k_gt_n"]:
        assert released == 1.0
        with pytest.raises(ValueError, match=f"k={int(k)} and num_samples={int(n)}"):
            pass_at_k(int(n), int(c), int(k))


@pytest.mark.parametrize("n,c", [(1000, 0), (1000, 1), (1000, 37), (1000, 999), (1000, 1000)])
@pytest.mark.parametrize("k", [1, 8, 500, 1000])
def test_pass_at_k_is_exact_for_many_samples(n, c, k):
    exact = float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
    np.testing.assert_allclose(pass_at_k(n, c, k), exact, rtol=0, atol=1e-12)


def test_pass_at_k_broadcasts_and_takes_no_prompts():
    np.testing.assert_allclose(pass_at_k(8, np.array([0, 1, 8]), 1), [0.0, 0.125, 1.0], atol=1e-15)
    assert pass_at_k(8, np.zeros(0, int), 8).shape == (0,)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((4, -1, 1), "num_correct=-1 of num_samples=4"),
        ((4, 5, 1), "num_correct=5 and num_samples=4"),
        ((4, 1, 0), "k=0 with num_samples=4"),
        ((4, 0.5, 1), "num_correct must be an integer, got 0.5"),
    ],
)
def test_pass_at_k_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


def test_mean_at_n(golden):
    np.testing.assert_allclose(mean_at_n(golden["correct"]), golden["avg_at_9"], rtol=0, atol=1e-12)
    for scores in (np.zeros(3), np.zeros((3, 0)), [[np.nan]]):
        with pytest.raises(ValueError, match="scores must"):
            mean_at_n(scores)


@pytest.mark.parametrize("k", [3, 5])
def test_maj_at_k_equals_enumeration_of_subsets(golden, k):
    value = maj_at_k(golden["maj_answers"].tolist(), golden["maj_gt"].tolist(), k)
    np.testing.assert_allclose(value, golden[f"maj_at_{k}_exact_fractie"], rtol=0, atol=1e-12)
    # Deviation: the released code gives a tie to the answer seen first.
    assert np.abs(value - golden[f"maj_at_{k}_exact_firstseen"]).max() > 0.01


def test_maj_at_n_equals_the_released_code_where_the_winner_is_unique(golden):
    answers = golden["maj_answers"]
    value = maj_at_k(answers.tolist(), golden["maj_gt"].tolist(), 9)
    most = np.stack([np.bincount(row, minlength=10) for row in answers])
    unique = (most == most.max(axis=1, keepdims=True)).sum(axis=1) == 1
    assert 0 < unique.sum() < len(answers)
    np.testing.assert_array_equal(value[unique], golden["maj_at_9_firstseen"][unique])
    assert (value[~unique] != golden["maj_at_9_firstseen"][~unique]).any()


def test_unparsed_answers_use_a_draw_and_cast_no_vote():
    row, target = ["7", None, None, "3", "7", None], "7"
    for k in range(1, 7):
        scores = []
        for subset in itertools.combinations(row, k):
            votes = [a for a in subset if a is not None]
            best = max((votes.count(a) for a in votes), default=0)
            tied = {a for a in votes if votes.count(a) == best}
            scores.append(1 / len(tied) if target in tied else 0.0)
        np.testing.assert_allclose(maj_at_k([row], [target], k), [np.mean(scores)], rtol=0, atol=1e-12)
    assert maj_at_k([[-1, -1]], [4], 2, unparsed=-1) == 0.0
    assert maj_at_k([[-1, 4]], [-1], 1, unparsed=-1) == 0.0


def test_maj_at_k_refuses_bad_input():
    with pytest.raises(ValueError, match="k=3 and 2 answers"):
        maj_at_k([[1, 2]], [1], 3)
    with pytest.raises(ValueError, match="equal length, got 1 and 2"):
        maj_at_k([[1, 2]], [1, 2], 1)


def test_bootstrap_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(0.3, 1.0, 60), seed, num_resamples=400)
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 200  # 190 expected; five binomial standard deviations are 15


def test_bootstrap_interval_is_seeded_and_handles_one_prompt():
    values = np.linspace(0, 1, 20)
    assert bootstrap_interval(values, 3) == bootstrap_interval(values, 3)
    assert bootstrap_interval(values, 3) != bootstrap_interval(values, 4)
    assert bootstrap_interval(values, 3, level=0.5).low > bootstrap_interval(values, 3).low
    assert bootstrap_interval([0.25], 0) == (0.25, 0.25)


def test_bootstrap_interval_of_many_prompts_is_drawn_in_blocks():
    values = np.random.default_rng(0).normal(size=300_000)
    low, high = bootstrap_interval(values, 0, num_resamples=40)
    error = 1 / np.sqrt(values.size)
    assert values.mean() - 4 * error < low < values.mean() < high < values.mean() + 4 * error


def test_bootstrap_interval_refuses_bad_input():
    for values in ([], [[1.0]], [np.nan]):
        with pytest.raises(ValueError, match="values must be"):
            bootstrap_interval(values, 0)
    with pytest.raises(ValueError, match="num_resamples must be >= 1, got 0"):
        bootstrap_interval([1.0], 0, num_resamples=0)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 1"):
        percentile_interval([1.0], 1)

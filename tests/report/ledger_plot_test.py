"""The picture of a ledger: what it shows, agreement by hand, and runs of which something is missing."""

import warnings

import numpy as np
import pytest

from jentropy.report.ledger_plot import agreement, covariance_by_difficulty, ledger_plot


def lines(num=40, every=10, noise=0.0):
    """A ledger whose measured change is 3/4 of Lemma 1's, plus a little."""
    rng = np.random.default_rng(0)
    found = []
    for step in range(num):
        lemma = -0.01 * np.exp(-step / 10) * (1.0 + 0.3 * np.sin(step))
        line = {"step": step, "stage": "law", "ledger/lemma1": lemma, "ledger/covariance": -lemma}
        line |= {"ledger/entropy_change": 0.75 * lemma + 1e-4 + noise * rng.normal()}
        if step % every == 0:
            line["ledger/first_order"] = 0.9 * lemma
        for part, fraction in (("0", 0.25), ("0.5", 0.5), ("1", 0.25)):
            share = {"fraction": fraction, "covariance": fraction * (0.2 if part == "0.5" else -0.1)}
            line |= {f"ledger/difficulty/{part}/{quantity}": value for quantity, value in share.items()}
        line |= {f"ledger/difficulty/0.75/{quantity}": 0.0 for quantity in ("fraction", "covariance")}
        found.append(line)
    return found


def draw(tmp_path, found):
    """The words of the picture: Matplotlib writes each as a comment beside its outlines."""
    path = tmp_path / "ledger.svg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger_plot(found, path, "law_ledger")
    return path.read_text()


def test_the_picture_has_every_panel(tmp_path):
    words = draw(tmp_path, lines())
    for text in ("law_ledger", "measured", "Lemma 1: correlation 1.000, slope 0.75", "below 1", "predicted change"):
        assert text in words
    assert "first order in the parameters: correlation 1.000, slope 0.83" in words
    assert "no data" not in words


@pytest.mark.parametrize("found", [[], [{"step": 0}], [{"step": 0, "ledger/lemma1": "nan"}]])
def test_an_empty_ledger_says_what_is_missing(tmp_path, found):
    words = draw(tmp_path, found)
    assert words.count("no data: ledger/entropy_change") == 3 and "no data: ledger/difficulty" in words


@pytest.mark.parametrize("num", [1, 2, 3])
def test_short_ledgers_are_drawn(tmp_path, num):
    words = draw(tmp_path, lines(num))
    assert "first order in the parameters: no correlation, steps: 1" in words and "nan" not in words
    assert (f"Lemma 1: no correlation, steps: {num}" in words) == (num < 3)


def test_agreement_is_that_of_numpy():
    found = lines(noise=0.002)
    x, y = (np.array([line[f"ledger/{key}"] for line in found]) for key in ("lemma1", "entropy_change"))
    result = agreement(found, "ledger/lemma1")
    np.testing.assert_allclose(result.correlation, np.corrcoef(x, y)[0, 1])
    np.testing.assert_allclose(result.slope, np.polyfit(x, y, 1)[0])
    assert result.num_steps == 40 and result.correlation < 0.99
    np.testing.assert_allclose(agreement(found, "ledger/covariance", sign=-1.0)[:2], result[:2])
    assert agreement(found, "ledger/covariance").correlation == pytest.approx(-result.correlation)
    assert agreement(found, "ledger/first_order").num_steps == 4


def test_agreement_of_what_does_not_vary_is_not_a_number():
    constant = [{"step": i, "ledger/lemma1": 0.1, "ledger/entropy_change": float(i)} for i in range(5)]
    for found in (constant, lines(2), []):
        assert np.isnan(agreement(found, "ledger/lemma1")[:2]).all()


def test_covariance_by_difficulty_is_a_mean_over_tokens():
    found = covariance_by_difficulty(lines())
    assert list(found) == ["0", "0.5", "1"]
    np.testing.assert_allclose(list(found.values()), [-0.1, 0.2, -0.1])

"""Lines in ln N through coefficients: exact ones, their intervals by hand, and what determines no line."""

import numpy as np
import pytest

from jentropy.regression import LawError
from jentropy.theory.sizes import fit_sizes

SIZES = np.array([1e5, 3e5, 1e6, 3e6])


def exact(size):
    """a(N) and b(N) of known lines."""
    return 0.9 - 0.03 * np.log(size), 1.2 + 0.02 * np.log(size)


def test_exact_lines_are_recovered_and_extrapolated():
    law = fit_sizes(SIZES, *exact(SIZES))
    np.testing.assert_allclose([law.a.intercept, law.a.slope], [0.9, -0.03], rtol=1e-9)
    np.testing.assert_allclose([law.b.intercept, law.b.slope], [1.2, 0.02], rtol=1e-9)
    a, b = exact(1e8)
    for name, truth in {"a": a, "b": b, "ceiling": b - a}.items():
        value, (low, high) = law.predict(1e8)[name]
        np.testing.assert_allclose([value, low, high], truth, rtol=1e-9)
    np.testing.assert_allclose(law.reward(1e8, [0.0, 0.5]), [b - a, b - a * np.exp(0.5)], rtol=1e-9)


def test_runs_of_one_size_count_as_one():
    size, (a, b) = np.repeat(SIZES, 3), exact(np.repeat(SIZES, 3))
    a, b = a + np.tile([-0.1, 0.0, 0.1], 4), b + np.tile([0.2, -0.1, -0.1], 4)
    order = np.random.default_rng(0).permutation(12)
    law, plain = fit_sizes(size[order], a[order], b[order]), fit_sizes(SIZES, *exact(SIZES))
    assert law.sizes == tuple(SIZES)
    np.testing.assert_allclose([law.a.slope, law.b.slope], [plain.a.slope, plain.b.slope], rtol=1e-9)
    np.testing.assert_allclose([law.a.variance, law.b.variance], 0.0, atol=1e-20)


def test_the_interval_of_three_sizes_has_one_degree_of_freedom():
    """Sizes e^0, e^1, e^2 with a = 1, 2, 4: line 5/6 + 3/2 x, residual sum of squares 1/6, t = 6.3138."""
    law = fit_sizes(np.exp([0.0, 1.0, 2.0]), [1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    value, (low, high) = law.predict(float(np.exp(4.0)))["a"]
    half = 6.313751515 * np.sqrt(1 / 6 * (1 + 1 / 3 + 9 / 2))
    np.testing.assert_allclose([value, low, high], [5 / 6 + 6, 5 / 6 + 6 - half, 5 / 6 + 6 + half], rtol=1e-8)


def test_intervals_cover_a_further_size():
    rng, inside = np.random.default_rng(0), []
    for _ in range(500):
        a, b = exact(np.append(SIZES, 1e7)) + 0.02 * rng.standard_normal((2, 5))
        low, high = fit_sizes(SIZES, a[:4], b[:4]).predict(1e7)["ceiling"].interval
        inside.append(low <= b[4] - a[4] <= high)
    assert 0.85 <= np.mean(inside) <= 0.95


def test_two_sizes_give_a_line_and_no_error():
    law = fit_sizes(SIZES[:2], *exact(SIZES[:2]))
    np.testing.assert_allclose(law.reward(1e6, 0.0), exact(1e6)[1] - exact(1e6)[0], rtol=1e-9)
    with pytest.raises(LawError, match="at least 3 sizes for its error, got 2: a line fits two exactly"):
        law.predict(1e6)


@pytest.mark.parametrize(
    "size,a,b,message",
    [
        ([1e5, 1e5], [1, 2], [1, 2], "at least 2 sizes, got 1"),
        ([], [], [], "at least 2 sizes, got 0"),
        ([1e5, 0], [1, 2], [1, 2], "size must be positive, got 0"),
        ([1e5, 1e6], [1, 2], [1], "unequal lengths: 2 sizes, 2 a, 1 b"),
        ([1e5, 1e6], [1, np.nan], [1, 2], "a is not finite at point 1"),
    ],
)
def test_sizes_that_determine_no_line_are_refused(size, a, b, message):
    with pytest.raises(LawError, match=message):
        fit_sizes(size, a, b)

"""Student's t against tables, weighted lines against their definition, intervals of means."""

import doctest

import numpy as np
import pytest

from jentropy import regression
from jentropy.regression import LawError, fit_line, mean_interval, student_t

TABLE = {
    1: (6.3138, 12.7062, 63.6567),
    2: (2.9200, 4.3027, 9.9248),
    3: (2.3534, 3.1824, 5.8409),
    4: (2.1318, 2.7764, 4.6041),
    5: (2.0150, 2.5706, 4.0321),
    10: (1.8125, 2.2281, 3.1693),
    15: (1.7531, 2.1314, 2.9467),
    120: (1.6577, 1.9799, 2.6174),
}
"""Printed quantiles of Student's t for 90, 95 and 99 %."""


@pytest.mark.parametrize("dof", TABLE)
def test_students_t_is_that_of_the_tables(dof):
    np.testing.assert_allclose([student_t(level, dof) for level in (0.9, 0.95, 0.99)], TABLE[dof], atol=5e-5)


def test_students_t_refuses_what_it_is_not_defined_for():
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 1.0"):
        student_t(1.0, 3)
    with pytest.raises(ValueError, match="dof must be >= 1, got 0"):
        student_t(0.9, 0)


def test_a_line_and_its_errors():
    line = fit_line([0.0, 1.0, 2.0], [1.0, 2.0, 4.0])
    np.testing.assert_allclose([line.intercept, line.slope, line.variance], [5 / 6, 3 / 2, 1 / 6])
    np.testing.assert_allclose([line.slope_stderr**2, line.intercept_stderr**2], [1 / 12, 1 / 6 * (1 / 3 + 1 / 2)])
    np.testing.assert_allclose(line.covariance, -1 / 12)
    x = np.array([[0.0, 3.0]])
    variance = line.intercept_stderr**2 + 2 * x * line.covariance + (x * line.slope_stderr) ** 2
    np.testing.assert_allclose(line.stderr(x), np.sqrt(variance))


def test_equal_weights_are_no_weights():
    x, y = np.arange(5.0), np.array([1.0, 0.0, 2.0, 2.5, 3.0])
    assert fit_line(x, y, np.full(5, 8.0)) == fit_line(x, y)


def test_two_points_have_no_interval():
    line = fit_line([0.0, 1.0], [1.0, 3.0])
    np.testing.assert_allclose(line.predict([2.0]), [5.0])
    with pytest.raises(LawError, match="2 points fit a line exactly"):
        line.prediction_interval(2.0, 0.9)


def test_mean_interval_by_hand():
    mean, stderr, (low, high) = mean_interval([1.0, 2.0, 3.0], 0.95)
    np.testing.assert_allclose([mean, stderr], [2.0, 1 / np.sqrt(3)])
    np.testing.assert_allclose([low, high], [2 - 4.302652730 / np.sqrt(3), 2 + 4.302652730 / np.sqrt(3)], rtol=1e-8)
    with pytest.raises(LawError, match="at least 2 of them, got 1"):
        mean_interval([1.0], 0.9)


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(regression).failed == 0

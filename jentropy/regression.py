"""Straight lines through few points, in NumPy: least squares, Student's t, intervals of predictions and of means.

What the law R = -a exp(H) + b and the dependence of a and b on the size of the policy have in common: both are lines.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jentropy.evaluation import Interval

FloatArray = NDArray[np.float64]


class LawError(ValueError):
    """The points do not determine the law, or do not follow it at all; the message says why."""


@dataclass(frozen=True)
class Line:
    """A fit of y = intercept + slope · x by weighted least squares.

    Attributes:
      intercept: at x = 0.
      slope: of the line.
      mean_x: weighted mean of x, where the line is known best.
      spread: sum of (x - mean_x)², weights scaled to a mean of 1.
      variance: of a point of mean weight about the line, with n - 2 degrees of freedom; 0 for two points.
      num_points: n.
    """

    intercept: float
    slope: float
    mean_x: float
    spread: float
    variance: float
    num_points: int

    @property
    def slope_stderr(self) -> float:
        """Standard error of the slope."""
        return math.sqrt(self.variance / self.spread)

    @property
    def intercept_stderr(self) -> float:
        """Standard error of the intercept."""
        return float(self.stderr(0.0))

    @property
    def covariance(self) -> float:
        """Of the estimates of intercept and slope."""
        return -self.variance * self.mean_x / self.spread

    def predict(self, x: ArrayLike) -> FloatArray:
        """The line at each x, any shape."""
        return self.intercept + self.slope * np.asarray(x, np.float64)

    def stderr(self, x: ArrayLike) -> FloatArray:
        """Standard error of the line at each x: intercept and slope are uncertain together, with their covariance."""
        distance = np.asarray(x, np.float64) - self.mean_x
        return np.sqrt(self.variance * (1.0 / self.num_points + distance**2 / self.spread))

    def prediction_interval(self, x: ArrayLike, level: float) -> tuple[FloatArray, FloatArray]:
        """Where a further point at each x lies with probability `level`.

            ŷ(x) ± t · sqrt(s² + s² / n + s² (x - x̄)² / Σ(x - x̄)²),   t of n - 2 degrees of freedom

        The first term is the noise of the further point, the others are the uncertainty of the line. Exact if the
        points lie about a straight line with independent normal noise of one variance.

        Raises:
          LawError: two points, which any line fits exactly.
        """
        if self.num_points < 3:
            raise LawError(f"{self.num_points} points fit a line exactly: there is no residual error for an interval")
        half = student_t(level, self.num_points - 2) * np.sqrt(self.variance + self.stderr(x) ** 2)
        return self.predict(x) - half, self.predict(x) + half


def fit_line(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> Line:
    """Fits y = intercept + slope · x.

    Args:
      x: `[n]` finite, n ≥ 2, not all equal: the caller has checked it.
      y: `[n]` finite.
      weights: `[n]` > 0, proportional to the inverse variance of each y; equal if left out. Only ratios matter.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    w = w / w.mean()
    mean_x, mean_y = (w * x).mean(), (w * y).mean()
    spread = (w * (x - mean_x) ** 2).sum()
    slope = (w * (x - mean_x) * (y - mean_y)).sum() / spread
    intercept = mean_y - slope * mean_x
    residual = y - intercept - slope * x
    variance = (w * residual**2).sum() / (x.size - 2) if x.size > 2 else 0.0
    numbers = (intercept, slope, mean_x, spread, variance)
    return Line(*(float(number) for number in numbers), num_points=x.size)


@functools.cache
def student_t(level: float, dof: int) -> float:
    """The t with P(|T| ≤ t) = level, T of Student's distribution with `dof` degrees of freedom.

    By bisection of the finite sums for the probability, which are exact (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    >>> f"{student_t(0.9, 18):.4f} {student_t(0.95, 1):.3f}"
    '1.7341 12.706'
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    if dof < 1:
        raise ValueError(f"dof must be >= 1, got {dof!r}")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _central(middle, dof) < level else (low, middle)
    return math.sqrt(dof) * math.tan(low)


def _central(angle: float, dof: int) -> float:
    """P(|T| ≤ sqrt(dof) · tan(angle))."""
    odd, square = dof % 2, math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = term if dof > 1 else 0.0
    for k in range(3 if odd else 2, dof - 1, 2):
        term *= square * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2.0 / math.pi * (angle + total) if odd else total


def mean_interval(values: Sequence[float], level: float) -> tuple[float, float, Interval]:
    """Mean over independent runs, its standard error, and its interval by Student's t; at least two values.

    Raises:
      LawError: fewer than two values, which say nothing about their spread.
    """
    x = np.asarray(values, np.float64)
    if x.size < 2:
        raise LawError(f"an interval over runs needs at least 2 of them, got {x.size}")
    mean, stderr = float(x.mean()), float(x.std(ddof=1) / math.sqrt(x.size))
    half = student_t(level, x.size - 1) * stderr
    return mean, stderr, Interval(mean - half, mean + half)


def finite_vector(name: str, value: ArrayLike) -> FloatArray:
    """The value as a vector of finite float64, or a `LawError` that names it."""
    array = np.asarray(value, np.float64)
    if array.ndim != 1:
        raise LawError(f"{name} must be a vector, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise LawError(f"{name} is not finite at point {int(np.argmin(np.isfinite(array)))}")
    return array

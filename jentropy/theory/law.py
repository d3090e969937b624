"""The law R = -a exp(H) + b: what a run's policy entropy H buys in reward R, and where that trade ends.

The law is linear in x = exp(H), so it is fitted by least squares in closed form. At H = 0 nothing is left to trade:
b - a is the ceiling of the reward. It describes runs without entropy or KL control, and a and b depend on the model
and the data rather than on the algorithm.

Where it says nothing there is a message and no number. `fit_law` takes points in any order and refuses those that leave
a and b undetermined: fewer than three, a value that is not finite, entropy that does not vary. `fit_run` takes the
points of one run in the order of its steps, and also refuses numbers that are determined but are not the law's: of a
run whose entropy rises, which spends none, and of one whose reward did not rise as its entropy fell (a ≤ 0), where
b - a is no ceiling. Forecasts use `fit_law`: their errors count the beginnings that mislead.

Reference: arXiv 2505.22617, section 2.4. There H is the policy entropy on the training prompts at the step of the
evaluation, in nats, and R the validation accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jentropy.evaluation import Interval, bootstrap_interval, percentile_interval
from jentropy.regression import FloatArray, Line, finite_vector, fit_line
from jentropy.regression import LawError as LawError

MIN_POINTS = 3
_SPREAD = 1e-9  # smallest spread of exp(H), relative to its size, that a slope can be fitted to
_LEVERAGE = 1.0 - 1e-9  # share of a point's fit that is its own, above which all hangs on it


@dataclass(frozen=True)
class Law:
    """A fit of R = -a exp(H) + b.

    Attributes:
      a: slope against exp(H), with the sign of the law: positive when reward rises as entropy falls.
      b: intercept.
      a_stderr: standard error of a, from the residual variance with n - 2 degrees of freedom.
      b_stderr: standard error of b.
      covariance: of the estimates of a and b; they are strongly correlated.
      r_squared: fraction of the (weighted) variance of R explained; NaN when R is constant.
      rmse: root of the (weighted) mean squared residual, in the units of R.
      num_points: n, points with positive weight.
      line: the same fit as a line in exp(H), for intervals.
    """

    a: float
    b: float
    a_stderr: float
    b_stderr: float
    covariance: float
    r_squared: float
    rmse: float
    num_points: int
    line: Line = field(repr=False)

    @property
    def ceiling(self) -> float:
        """The reward at zero entropy, b - a."""
        return self.b - self.a

    @property
    def ceiling_stderr(self) -> float:
        """Standard error of b - a."""
        return float(self.line.stderr(1.0))

    def predict(self, entropy: ArrayLike) -> FloatArray:
        """The reward at each entropy in nats, any shape."""
        return self.b - self.a * np.exp(np.asarray(entropy, np.float64))

    def prediction_interval(self, entropy: ArrayLike, level: float = 0.9) -> tuple[FloatArray, FloatArray]:
        """Where a further evaluation at each entropy lies with probability `level`; see `Line.prediction_interval`.

        It holds the uncertainty of a and b with their covariance, and the noise of the evaluation. It assumes that the
        law goes on as it was where it was fitted, and independent normal noise of one variance about it. Of real runs
        `coverage` says how often it is right.
        """
        return self.line.prediction_interval(np.exp(np.asarray(entropy, np.float64)), level)


class Intervals(NamedTuple):
    """Bootstrap intervals of one fit."""

    a: Interval
    b: Interval
    ceiling: Interval


class Forecast(NamedTuple):
    """How well the law, fitted to the beginning of a run, predicts the rest.

    Attributes:
      law: the fit to the first `law.num_points` points.
      num_predicted: points after those.
      rmse: root mean squared error on them, in the units of R.
      bias: mean of predicted minus measured reward on them.
      covered: fraction of them in their prediction intervals.
      predicted: `[num_predicted]`, reward by the law.
      low: `[num_predicted]`, of the prediction intervals.
      high: `[num_predicted]`.
    """

    law: Law
    num_predicted: int
    rmse: float
    bias: float
    covered: float
    predicted: FloatArray
    low: FloatArray
    high: FloatArray


class Coverage(NamedTuple):
    """How often the prediction intervals of forecasts hold what was measured, over many runs.

    Attributes:
      level: of the intervals.
      covered: fraction of the predicted points in their intervals, mean over runs.
      interval: 90 % bootstrap interval of it over runs; the points of one run share the errors of a and b.
      rmse: error of each run's forecast.
      num_points: predicted, of all runs.
      refused: why there is no forecast, by index of the run.
    """

    level: float
    covered: float
    interval: Interval
    rmse: tuple[float, ...]
    num_points: int
    refused: dict[int, str]


def fit_law(entropy: ArrayLike, reward: ArrayLike, weights: ArrayLike | None = None) -> Law:
    """Fits R = -a exp(H) + b by (weighted) least squares.

        a = -cov(exp(H), R) / var(exp(H)),   b = mean(R) + a mean(exp(H))

    Args:
      entropy: `[n]`, H in nats.
      reward: `[n]`, R.
      weights: `[n]` ≥ 0, proportional to the inverse variance of each R (for instance its number of samples); equal
        if left out. Only their ratios matter. Points of weight 0 are left out.

    Returns:
      The fit.

    Raises:
      LawError: fewer than three points, a value that is not finite, or entropy that does not vary.

    >>> law = fit_law([0.8, 0.4, 0.2, 0.0], [0.4, 0.75, 0.87, 0.98])
    >>> print(f"R = -{law.a:.2f} exp(H) + {law.b:.2f}, ceiling {law.ceiling:.2f}")
    R = -0.47 exp(H) + 1.45, ceiling 0.98
    """
    x, y, w = _points(entropy, reward, weights)
    line = fit_line(x, y, w)
    residual = y - line.predict(x)
    about_mean = (w * (y - np.average(y, weights=w)) ** 2).sum()
    return Law(
        a=-line.slope,
        b=line.intercept,
        a_stderr=line.slope_stderr,
        b_stderr=line.intercept_stderr,
        covariance=-line.covariance,
        r_squared=float(1.0 - (w * residual**2).sum() / about_mean) if np.ptp(y) > 0 else float("nan"),
        rmse=float(np.sqrt((w * residual**2).sum() / w.sum())),
        num_points=x.size,
        line=line,
    )


def fit_run(entropy: ArrayLike, reward: ArrayLike) -> Law:
    """`fit_law` of one run, whose points must follow the law.

    Args:
      entropy: `[n]`, H in nats, in the order of the steps.
      reward: `[n]`, R.

    Raises:
      LawError: as in `fit_law`; entropy rises over the run (its least-squares trend is not negative); or reward did not
        rise as entropy fell (a is not positive), so that b - a is no ceiling.
    """
    law = fit_law(entropy, reward)
    entropy, reward = finite_vector("entropy", entropy), finite_vector("reward", reward)
    order = np.arange(entropy.size) - (entropy.size - 1) / 2
    if (order * entropy).sum() >= 0.0:
        raise LawError("entropy rises over the run: none was spent")
    if law.a * np.ptp(np.exp(entropy)) <= _SPREAD * np.abs(reward).max():
        raise LawError("reward did not rise as entropy fell (a <= 0)")
    return law


def bootstrap_intervals(
    entropy: ArrayLike,
    reward: ArrayLike,
    seed: int,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.9,
    num_resamples: int = 2000,
) -> Intervals:
    """Percentile intervals of a, b and the ceiling by the wild bootstrap: residuals with random signs, fitted again.

        R*_i = R̂_i ± e_i / (1 - h_i),   e the residuals, h the leverages

    The few points of high entropy, on which a hangs most, are in every resample, and the noise may differ along the
    curve, as that of an accuracy does. The points of one run are correlated in time, which this does not model: over
    several runs, take the interval over runs instead (`regression.mean_interval`).

    Args:
      entropy: `[n]`, H in nats.
      reward: `[n]`, R.
      seed: of `numpy.random.default_rng`.
      weights: as in `fit_law`.
      level: confidence level, in (0, 1).
      num_resamples: bootstrap draws, ≥ 1.

    Raises:
      LawError: as in `fit_law`, or a point without which the rest would not determine the law.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be >= 1, got {num_resamples!r}")
    x, y, w = _points(entropy, reward, weights)
    line = fit_line(x, y, w)
    dx = x - line.mean_x
    of_slope = w * dx / line.spread
    of_mean = w / x.size
    leverage = of_mean + of_slope * dx
    if leverage.max() > _LEVERAGE:
        at = np.log(x[np.argmax(leverage)])
        raise LawError(f"the law hangs on one point, at {at:.3g} nats: without it entropy does not vary")
    residual = (y - line.predict(x)) / (1.0 - leverage)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(num_resamples, x.size))
    changed = signs * residual
    a = -line.slope - (changed * of_slope).sum(-1)
    b = line.predict(0.0) + (changed * (of_mean - line.mean_x * of_slope)).sum(-1)
    return Intervals(*(percentile_interval(draws, level) for draws in (a, b, b - a)))


def forecast(
    entropy: ArrayLike,
    reward: ArrayLike,
    *,
    fraction: float | None = None,
    num_fitted: int | None = None,
    level: float = 0.9,
) -> Forecast:
    """Fits the law to the beginning of a run and predicts the reward of the rest from their entropy.

    Args:
      entropy: `[n]`, H in nats, in the order of the steps.
      reward: `[n]`, R.
      fraction: of the points to fit, in (0, 1); floor(fraction · n) of them, at least three.
      num_fitted: the number of points to fit, instead of `fraction`.
      level: of the prediction intervals; see `Law.prediction_interval`.

    Returns:
      The fit and its error on the rest.

    Raises:
      LawError: as in `fit_law`, for the points that are fitted; or no point is left to predict.
    """
    entropy, reward = finite_vector("entropy", entropy), finite_vector("reward", reward)
    if (fraction is None) == (num_fitted is None):
        raise ValueError("give fraction or num_fitted, and not both")
    k = num_fitted or 0
    if fraction is not None:
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction must be in (0, 1), got {fraction!r}")
        k = int(fraction * entropy.size)
    law = fit_law(entropy[:k], reward[:k])
    if k >= entropy.size:
        raise LawError(f"all {entropy.size} points are fitted: none is left to predict")
    predicted, measured = law.predict(entropy[k:]), reward[k:]
    low, high = law.prediction_interval(entropy[k:], level)
    error, inside = predicted - measured, (low <= measured) & (measured <= high)
    rmse, bias, covered = float(np.sqrt(np.mean(error**2))), float(np.mean(error)), float(np.mean(inside))
    return Forecast(law, error.size, rmse, bias, covered, predicted, low, high)


def coverage(runs: Sequence[tuple[ArrayLike, ArrayLike]], fraction: float, level: float = 0.9) -> Coverage:
    """How often the prediction intervals hold what was measured later, over many runs.

    Args:
      runs: entropy `[n]` in nats and reward `[n]` of each, in the order of the steps.
      fraction: of each run's points to fit.
      level: of the intervals.

    Raises:
      LawError: no run has a forecast.
    """
    found, refused = [], {}
    for index, (entropy, reward) in enumerate(runs):
        try:
            found.append(forecast(entropy, reward, fraction=fraction, level=level))
        except LawError as error:
            refused[index] = str(error)
    if not found:
        raise LawError("; ".join(dict.fromkeys(refused.values())) or "there is no run")
    shares = [each.covered for each in found]
    return Coverage(
        level, float(np.mean(shares)), bootstrap_interval(shares, 0, level=0.9), tuple(each.rmse for each in found),
        sum(each.num_predicted for each in found), refused,
    )  # fmt: skip


def _points(
    entropy: ArrayLike, reward: ArrayLike, weights: ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """x = exp(H), R and weights of the points that count, or a `LawError` that says why they determine nothing."""
    entropy, reward = finite_vector("entropy", entropy), finite_vector("reward", reward)
    weights = np.ones_like(entropy) if weights is None else finite_vector("weights", weights)
    if not entropy.size == reward.size == weights.size:
        raise LawError(f"unequal lengths: {entropy.size} entropies, {reward.size} rewards, {weights.size} weights")
    if (weights < 0).any():
        raise LawError(f"weights must be >= 0, got {weights.min():g}")
    keep = weights > 0
    if keep.sum() < MIN_POINTS:
        raise LawError(f"the law needs at least {MIN_POINTS} points, got {keep.sum()}")
    with np.errstate(over="ignore"):
        x = np.exp(entropy[keep])
    if not np.isfinite(x).all():
        raise LawError(f"exp(entropy) overflows at entropy {entropy.max():g}: is it in nats?")
    if np.ptp(x) <= _SPREAD * x.max():
        raise LawError(f"entropy does not vary: all {x.size} points lie at {entropy[keep][0]:g} nats")
    return x, reward[keep], weights[keep] / weights[keep].mean()

"""The law R = -a exp(H) + b: what a run's policy entropy H buys in reward R, and where that trade ends.

The law is linear in x = exp(H), so it is fitted by least squares in closed form. At H = 0 nothing is left to trade:
b - a is the ceiling of the reward. It describes runs without entropy or KL control, and a and b depend on the model
and the data rather than on the algorithm.

Reference: arXiv 2505.22617, section 2.4. There H is the policy entropy on the training prompts at the step of the
evaluation, in nats, and R the validation accuracy.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jentropy.evaluation import Interval, percentile_interval

FloatArray = NDArray[np.float64]

MIN_POINTS = 3
_SPREAD = 1e-9  # smallest spread of exp(H), relative to its size, that a slope can be fitted to


class LawError(ValueError):
    """The points do not determine the law."""


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
    """

    a: float
    b: float
    a_stderr: float
    b_stderr: float
    covariance: float
    r_squared: float
    rmse: float
    num_points: int

    @property
    def ceiling(self) -> float:
        """The reward at zero entropy, b - a."""
        return self.b - self.a

    @property
    def ceiling_stderr(self) -> float:
        """Standard error of b - a."""
        return float(np.sqrt(max(self.a_stderr**2 + self.b_stderr**2 - 2.0 * self.covariance, 0.0)))

    def predict(self, entropy: ArrayLike) -> FloatArray:
        """The reward at each entropy in nats, any shape."""
        return self.b - self.a * np.exp(np.asarray(entropy, np.float64))


class Forecast(NamedTuple):
    """How well the law, fitted to the beginning of a run, predicts the rest.

    Attributes:
      law: the fit to the first `law.num_points` points.
      num_predicted: points after those.
      rmse: root mean squared error on them, in the units of R.
      bias: mean of predicted minus measured reward on them.
    """

    law: Law
    num_predicted: int
    rmse: float
    bias: float


class Consumption(NamedTuple):
    """What a run has spent and gained by one moment.

    Attributes:
      fraction: of the run's steps.
      step: the moment, interpolated linearly between evaluations.
      entropy_fraction: (H_0 - H) / (H_0 - H_end).
      reward_fraction: (R - R_0) / (R_end - R_0).
    """

    fraction: float
    step: float
    entropy_fraction: float
    reward_fraction: float


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
    a, b = _solve(x, y, w)
    residual = y + a * x - b
    mean_x, total = np.average(x, weights=w), w.sum()
    spread = (w * (x - mean_x) ** 2).sum()
    variance = (w * residual**2).sum() / (x.size - 2)
    about_mean = (w * (y - np.average(y, weights=w)) ** 2).sum()
    return Law(
        a=float(a),
        b=float(b),
        a_stderr=float(np.sqrt(variance / spread)),
        b_stderr=float(np.sqrt(variance * (1.0 / total + mean_x**2 / spread))),
        covariance=float(variance * mean_x / spread),
        r_squared=float(1.0 - (w * residual**2).sum() / about_mean) if np.ptp(y) > 0 else float("nan"),
        rmse=float(np.sqrt((w * residual**2).sum() / total)),
        num_points=x.size,
    )


def ceiling_interval(
    entropy: ArrayLike,
    reward: ArrayLike,
    seed: int,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.9,
    num_resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap interval of the ceiling b - a, by resampling points with replacement.

    Resamples that do not determine the law (fewer than two distinct entropies) are left out. The points of one run
    are correlated in time, which this does not model: over several runs, resample runs instead.

    Args:
      entropy: `[n]`, H in nats.
      reward: `[n]`, R.
      seed: of `numpy.random.default_rng`.
      weights: as in `fit_law`.
      level: confidence level, in (0, 1).
      num_resamples: bootstrap draws, ≥ 1.

    Returns:
      The interval of b - a.

    Raises:
      LawError: as in `fit_law`.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be >= 1, got {num_resamples!r}")
    x, y, w = _points(entropy, reward, weights)
    index = np.random.default_rng(seed).integers(x.size, size=(num_resamples, x.size))
    index = index[np.ptp(x[index], axis=1) > _SPREAD * np.abs(x).max()]
    if not len(index):
        raise LawError(f"none of {num_resamples} resamples of {x.size} points determines the law")
    a, b = _solve(x[index], y[index], w[index])
    return percentile_interval(b - a, level)


def forecast(entropy: ArrayLike, reward: ArrayLike, *, fraction: float) -> Forecast:
    """Fits the law to the first `fraction` of a run's points and predicts the reward of the rest from their entropy.

    Args:
      entropy: `[n]`, H in nats, in the order of the steps.
      reward: `[n]`, R.
      fraction: of the points to fit, in (0, 1); floor(fraction · n) of them, at least three.

    Returns:
      The fit and its error on the rest.

    Raises:
      LawError: as in `fit_law`, for the points that are fitted.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction!r}")
    entropy, reward = _finite("entropy", entropy), _finite("reward", reward)
    num_fitted = int(fraction * entropy.size)
    law = fit_law(entropy[:num_fitted], reward[:num_fitted])
    error = law.predict(entropy[num_fitted:]) - reward[num_fitted:]
    return Forecast(law, error.size, float(np.sqrt(np.mean(error**2))), float(np.mean(error)))


def entropy_consumption(
    step: ArrayLike, entropy: ArrayLike, reward: ArrayLike, fractions: tuple[float, ...] = (1 / 12, 1 / 3)
) -> tuple[Consumption, ...]:
    """How much of a run's entropy is spent, and of its reward gained, after each fraction of its steps.

    The defaults are the paper's: 200 and 800 of 2400 steps, where it finds 73 % / 76 % and 93 % / 94 %.

    Args:
      step: `[n]`, increasing.
      entropy: `[n]`, H in nats.
      reward: `[n]`, R.
      fractions: of the steps from the first to the last, in [0, 1].

    Returns:
      One row per fraction.

    Raises:
      LawError: entropy or reward is the same at both ends, so that the fractions are undefined.

    Reference: arXiv 2505.22617, section 2.3.
    """
    step, entropy, reward = _finite("step", step), _finite("entropy", entropy), _finite("reward", reward)
    if not step.size == entropy.size == reward.size or step.size < 2 or not (np.diff(step) > 0).all():
        raise LawError("step, entropy and reward must have equal length, at least 2, and step must increase")
    for name, value in (("entropy", entropy), ("reward", reward)):
        if value[0] == value[-1]:
            raise LawError(f"{name} is {value[0]:g} at the first and the last point: nothing was consumed")
    rows = []
    for fraction in fractions:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fractions must be in [0, 1], got {fraction!r}")
        moment = step[0] + fraction * (step[-1] - step[0])
        spent = (entropy[0] - np.interp(moment, step, entropy)) / (entropy[0] - entropy[-1])
        gained = (np.interp(moment, step, reward) - reward[0]) / (reward[-1] - reward[0])
        rows.append(Consumption(fraction, float(moment), float(spent), float(gained)))
    return tuple(rows)


def _solve(x: FloatArray, y: FloatArray, w: FloatArray) -> tuple[FloatArray, FloatArray]:
    """a and b of y = -a x + b by weighted least squares over the last axis, centred for accuracy."""
    total = w.sum(-1)
    mean_x, mean_y = (w * x).sum(-1) / total, (w * y).sum(-1) / total
    dx = x - mean_x[..., None]
    a = -(w * dx * (y - mean_y[..., None])).sum(-1) / (w * dx**2).sum(-1)
    return a, mean_y + a * mean_x


def _points(
    entropy: ArrayLike, reward: ArrayLike, weights: ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """x = exp(H), R and weights of the points that count, or a `LawError` that says why they determine nothing."""
    entropy, reward = _finite("entropy", entropy), _finite("reward", reward)
    weights = np.ones_like(entropy) if weights is None else _finite("weights", weights)
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
    return x, reward[keep], weights[keep]


def _finite(name: str, value: ArrayLike) -> FloatArray:
    array = np.asarray(value, np.float64)
    if array.ndim != 1:
        raise LawError(f"{name} must be a vector, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise LawError(f"{name} is not finite at point {int(np.argmin(np.isfinite(array)))}")
    return array

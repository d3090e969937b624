"""The law's coefficients for a policy of another size: a and b are lines in the logarithm of its parameters.

    a(N) = a0 + a1 ln N,   b(N) = b0 + b1 ln N

Reference: arXiv 2505.22617, section 2.4: policies of one family, trained on the same data.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jentropy.evaluation import Interval
from jentropy.regression import FloatArray, LawError, Line, finite_vector, fit_line


class Predicted(NamedTuple):
    """A number that is expected of a further size.

    Attributes:
      value: on the line.
      interval: of prediction.
    """

    value: float
    interval: Interval


class SizeLaw(NamedTuple):
    """Lines in ln N through the coefficients of several sizes.

    Attributes:
      sizes: N, numbers of parameters, increasing.
      a: line of a; its `intercept` is a0 and its `slope` a1.
      b: line of b.
      ceiling: line of b - a, which has an error of its own since a and b are correlated.
    """

    sizes: tuple[float, ...]
    a: Line
    b: Line
    ceiling: Line

    def reward(self, size: float, entropy: ArrayLike) -> FloatArray:
        """The reward that a policy of `size` parameters buys down to each entropy in nats: b(N) - a(N) exp(H)."""
        x = np.log(size)
        return self.b.predict(x) - self.a.predict(x) * np.exp(np.asarray(entropy, np.float64))

    def predict(self, size: float, level: float = 0.9) -> dict[str, Predicted]:
        """`a`, `b` and `ceiling` of a policy of `size` parameters with their prediction intervals.

        They assume that the coefficients of the sizes, means over runs, lie about the line with independent normal
        noise of one variance; with three sizes one degree of freedom is left, and the intervals are wide.

        Raises:
          LawError: fewer than three sizes.
        """
        if len(self.sizes) < 3:
            raise LawError(
                f"extrapolation in ln N needs at least 3 sizes for its error, got {len(self.sizes)}: "
                "a line fits two exactly"
            )
        x, found = np.log(size), {}
        for name, line in (("a", self.a), ("b", self.b), ("ceiling", self.ceiling)):
            low, high = line.prediction_interval(x, level)
            found[name] = Predicted(float(line.predict(x)), Interval(float(low), float(high)))
        return found


def fit_sizes(size: ArrayLike, a: ArrayLike, b: ArrayLike) -> SizeLaw:
    """Fits a and b of several runs against the logarithm of the policy's size.

    The runs of one size are averaged first: they share what the line misses there, so that only sizes are independent.

    Args:
      size: `[n]` > 0, number of parameters of each run's policy.
      a: `[n]`, coefficients of each run's law.
      b: `[n]`.

    Raises:
      LawError: fewer than two sizes, lengths that differ, or a number that is not finite.
    """
    size_, a, b = finite_vector("size", size), finite_vector("a", a), finite_vector("b", b)
    if not size_.size == a.size == b.size:
        raise LawError(f"unequal lengths: {size_.size} sizes, {a.size} a, {b.size} b")
    if (size_ <= 0).any():
        raise LawError(f"size must be positive, got {size_.min():g}")
    sizes = np.unique(size_)
    if sizes.size < 2:
        raise LawError(f"extrapolation in ln N needs at least 2 sizes, got {sizes.size}")
    means = [np.array([values[size_ == each].mean() for each in sizes]) for values in (a, b, b - a)]
    return SizeLaw(tuple(float(each) for each in sizes), *(fit_line(np.log(sizes), mean) for mean in means))

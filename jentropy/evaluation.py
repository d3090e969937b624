"""Evaluation metrics over several samples per prompt, in NumPy: pass@k, mean@n, maj@k, bootstrap intervals.

Each metric returns one value per prompt, so that its mean is the metric and `bootstrap_interval` gives its
uncertainty over prompts.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

_MAX_DRAWS = 2**20  # numbers drawn at once by the bootstrap: bounds its memory


class Interval(NamedTuple):
    """A two-sided interval `[low, high]`, in the units of the quantity."""

    low: float
    high: float


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: ArrayLike) -> FloatArray:
    """Probability that at least one of k samples, drawn without replacement, is correct: the unbiased estimate.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - Π_{i=n-c+1..n} (1 - k / i)

    The released code returns 1 for k > n, even with c = 0; here that is an error.

    Args:
      num_samples: n, integers ≥ 1; the three arguments broadcast.
      num_correct: c, integers in `[0, n]`.
      k: integers in `[1, n]`.

    Returns:
      Float64 of the broadcast shape, in `[0, 1]`.

    Raises:
      ValueError: an argument is not an integer, or out of its range.

    Reference: arXiv 2107.03374, eq. 1.
    """
    n, c, k = np.broadcast_arrays(
        _integers("num_samples", num_samples), _integers("num_correct", num_correct), _integers("k", k)
    )
    _require_all(c >= 0, c, n, "num_correct must be >= 0, got num_correct={} of num_samples={}")
    _require_all(c <= n, c, n, "num_correct must be <= num_samples, got num_correct={} and num_samples={}")
    _require_all(k >= 1, k, n, "k must be >= 1, got k={} with num_samples={}")
    _require_all(k <= n, k, n, "k must be <= num_samples, got k={} and num_samples={}")
    missed = np.ones(n.shape)
    for i in range(1, int(n.max(initial=0)) + 1):
        missed = np.where((i > n - c) & (i <= n), missed * (1.0 - k / i), missed)
    return np.where(n - c < k, 1.0, 1.0 - missed)


def mean_at_n(scores: ArrayLike) -> FloatArray:
    """Mean score of each prompt's n samples (also called avg@n).

    Args:
      scores: `[P, n]` finite, P prompts with n ≥ 1 samples each.

    Returns:
      `[P]` float64.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must have shape [prompts, samples] with at least one sample, got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    return scores.mean(axis=1)


def maj_at_k(
    answers: Sequence[Sequence[Hashable]], targets: Sequence[Hashable], k: int, *, unparsed: Hashable = None
) -> FloatArray:
    """Expected accuracy of the majority answer of k samples, drawn without replacement: exact, no sampling.

    Samples without an answer use up a draw and cast no vote; no vote at all scores 0. A tie scores its expected value:
    1 / (number of tied answers) if the target is among them. verl instead gives a tie to the answer seen first and
    lets unparsed samples vote like any other.

    Args:
      answers: P rows of n answers, n ≥ k; equal answers compare equal.
      targets: P right answers.
      k: votes, in `[1, n]`.
      unparsed: the value that stands for "no answer".

    Returns:
      `[P]` float64, in `[0, 1]`.
    """
    if len(answers) != len(targets):
        raise ValueError(f"answers and targets must have equal length, got {len(answers)} and {len(targets)}")
    return np.array(
        [_majority_value(list(row), target, k, unparsed) for row, target in zip(answers, targets)], np.float64
    )


def bootstrap_interval(values: ArrayLike, seed: int, *, level: float = 0.95, num_resamples: int = 2000) -> Interval:
    """Percentile interval of the mean over prompts, by resampling prompts with replacement.

    For two methods on the same prompts pass the differences per prompt: paired intervals are narrower.

    Args:
      values: `[P]` finite, one value per prompt.
      seed: of `numpy.random.default_rng`; equal seeds give equal intervals.
      level: confidence level, in (0, 1).
      num_resamples: bootstrap draws, ≥ 1.

    Returns:
      The interval of the mean.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"values must be a non-empty, finite vector, one value per prompt, got shape {values.shape}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be >= 1, got {num_resamples!r}")
    rng = np.random.default_rng(seed)
    rows = max(1, _MAX_DRAWS // values.size)
    blocks = [min(rows, num_resamples - start) for start in range(0, num_resamples, rows)]
    means = [values[rng.integers(values.size, size=(block, values.size))].mean(axis=1) for block in blocks]
    return percentile_interval(np.concatenate(means), level)


def percentile_interval(draws: ArrayLike, level: float) -> Interval:
    """The central interval that holds the fraction `level`, in (0, 1), of the draws."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    low, high = np.quantile(np.asarray(draws, np.float64), [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(low), float(high))


def _majority_value(row: list[Hashable], target: Hashable, k: int, unparsed: Hashable) -> float:
    """Sums, over the target's number of votes, the subsets in which no other answer has more, by how many tie."""
    if not 1 <= k <= len(row):
        raise ValueError(f"k must be in [1, number of answers], got k={k!r} and {len(row)} answers")
    counts = Counter(row)
    num_unparsed, num_target = counts.pop(unparsed, 0), counts.pop(target, 0)
    if target == unparsed:
        return 0.0
    wins = Fraction(0)
    for votes in range(1, min(num_target, k) + 1):
        ways = {(votes, 0): math.comb(num_target, votes)}
        for count in counts.values():
            grown: defaultdict[tuple[int, int], int] = defaultdict(int)
            for (drawn, ties), number in ways.items():
                for other in range(min(count, votes, k - drawn) + 1):
                    grown[drawn + other, ties + (other == votes)] += number * math.comb(count, other)
            ways = grown
        for (drawn, ties), number in ways.items():
            wins += Fraction(number * math.comb(num_unparsed, k - drawn), ties + 1)
    return float(wins / math.comb(len(row), k))


def _integers(name: str, value: ArrayLike) -> NDArray[Any]:
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return array.astype(np.int64)


def _require_all(valid: NDArray[np.bool_], value: NDArray[Any], other: NDArray[Any], message: str) -> None:
    if not valid.all():
        worst = np.unravel_index(int(np.argmin(valid)), valid.shape)
        raise ValueError(message.format(value[worst], other[worst]))

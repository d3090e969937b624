"""The law along a run: what each evaluation adds to `metrics.jsonl` once its stage has enough of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jentropy.report.plots import law_points
from jentropy.theory.law import LawError, bootstrap_intervals, fit_run

MIN_EVALUATIONS = 4
"""Of a stage, before its law is written: with three, one degree of freedom is left."""

_LEVEL, _RESAMPLES = 0.9, 400


class LawMetrics:
    """Adds the law of the stage so far to the lines of evaluations.

    It is made of the evaluations alone, so a resumed run writes what an uninterrupted one does.

    Args:
      lines: of `metrics.jsonl`, where a resumed run goes on.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        self._evaluations = [line for line in lines if any(name.startswith("val/") for name in line)]

    def __call__(self, step: int, line: Mapping[str, Any]) -> dict[str, Any]:
        """The line of the evaluation at `step`, which is kept, with the `law_metrics` of its stage."""
        self._evaluations.append({**line, "step": step})
        stage = [other for other in self._evaluations if other.get("stage") == line.get("stage")]
        return {**line, **law_metrics(stage)}


def law_metrics(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The law of R = -a exp(H) + b after the evaluations of one stage.

    Args:
      lines: of the evaluations of one stage, in the order of the steps.

    Returns:
      `law/ceiling`, b - a, with its 90 % bootstrap interval `law/ceiling/low` and `law/ceiling/high`, and
      `law/fraction_of_ceiling`, the newest reward divided by it, with `law/fraction_of_ceiling/low` and `/high`, in
      which only the ceiling is uncertain. Nothing if there are fewer than `MIN_EVALUATIONS`, or they do not follow the
      law (see `theory.law.fit_run`); no fraction of a ceiling, or of an end of its interval, that is not positive.
    """
    points = law_points(lines)
    if len(points) != 1:
        return {}
    ((entropy, reward),) = points.values()
    if entropy.size < MIN_EVALUATIONS:
        return {}
    try:
        ceiling = fit_run(entropy, reward).ceiling
        low, high = bootstrap_intervals(entropy, reward, 0, level=_LEVEL, num_resamples=_RESAMPLES).ceiling
    except LawError:
        return {}
    found = {"law/ceiling": ceiling, "law/ceiling/low": low, "law/ceiling/high": high}
    fractions = {"": ceiling, "/low": high, "/high": low}
    newest = float(reward[-1])
    return found | {f"law/fraction_of_ceiling{end}": newest / x for end, x in fractions.items() if x > 0}

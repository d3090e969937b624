"""Methods compared over several runs each: means with intervals, paired differences, and what they say in words.

A pair is a warm start and a seed; a method has a row of figures (`summary.shift_row`, `law_row`) for each pair, or None
where its run failed or is missing. Nothing here drops such a run: counts name it, and its method gets no verdict.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Row: TypeAlias = Mapping[str, Any]
Runs: TypeAlias = Mapping[tuple[int, int], Row | None]
Results: TypeAlias = Mapping[str, Runs]
"""Runs of each method, by (warm start, seed)."""

NEVER, NOTHING = "never", "no result"
WORDS = {True: ("Better", "Worse"), False: ("Higher", "Lower")}
"""What a positive and a negative difference are called, by whether more of the figure is better."""


class Figure(NamedTuple):
    """A number that every run has.

    Attributes:
      key: in the row.
      heading: of its column and of its sentence.
      good: whether more of it is better, so that methods are better or worse instead of higher or lower.
    """

    key: str
    heading: str
    good: bool = True


class Judged(NamedTuple):
    """Methods by what the interval of their differences to the baseline says, each with its mean difference.

    Attributes:
      above: the interval is above 0.
      below: it is below 0.
      unclear: it contains 0.
      unjudged: a run of the method or of the baseline failed or is missing; the second number counts such pairs.
    """

    above: list[tuple[str, float]]
    below: list[tuple[str, float]]
    unclear: list[tuple[str, float]]
    unjudged: list[tuple[str, int]]


def interval(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over runs."""
    x = np.asarray(values, np.float64)
    means = x[np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(x.mean()), float(low), float(high)


def interval_text(values: Sequence[float]) -> str | None:
    """Such as `0.584 [0.446, 0.715]`; None without values."""
    if not values:
        return None
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def gains(runs: Runs, baseline: Runs, key: str) -> list[float]:
    """The method's figure minus the baseline's, of the pairs for which both have a row."""
    pairs = [(row, baseline.get(pair)) for pair, row in runs.items()]
    return [float(a[key] - b[key]) for a, b in pairs if a is not None and b is not None]


def _rows(runs: Runs) -> list[Row]:
    return [row for row in runs.values() if row is not None]


def _steps(row: Row | None) -> float:
    """Steps until the goal; infinite if it was never reached, by a run that failed above all."""
    steps = None if row is None else row["steps_to_goal"]
    return np.inf if steps is None else steps


def half_there(runs: Runs) -> str:
    """The steps after which half of all runs had reached the goal, rounded up to whole runs, or `never`."""
    steps = sorted(_steps(row) for row in runs.values())[(len(runs) - 1) // 2]
    return NEVER if np.isinf(steps) else str(steps)


def mean_rows(results: Results, figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Per method: number of runs, mean of every figure with its interval, steps until half of the runs are there."""
    table = []
    for method, runs in results.items():
        found = _rows(runs)
        number = len(found) if len(found) == len(runs) else f"{len(found)} of {len(runs)}"
        table.append({"method": method, "runs": number, "half": half_there(runs) if found else None})
        table[-1] |= {figure.key: interval_text([row[figure.key] for row in found]) for figure in figures}
    return table


def paired_rows(results: Results, baseline: str, figures: Sequence[Figure], main: str) -> list[dict[str, Any]]:
    """Per method but the baseline: wins in the figure `main`, how often it was sooner, mean differences."""
    table = []
    for method, runs in results.items():
        if method == baseline or baseline not in results:
            continue
        base = results[baseline]
        sooner = sum(_steps(row) < _steps(base.get(pair)) for pair, row in runs.items())
        later = sum(_steps(row) > _steps(base.get(pair)) for pair, row in runs.items())
        wins = sum(gain > 0 for gain in gains(runs, base, main))
        row = {"method": method, "wins": f"{wins} of {len(runs)}", "sooner": f"{sooner} : {later}"}
        table.append(row | {figure.key: interval_text(gains(runs, base, figure.key)) for figure in figures})
    return table


def run_rows(results: Results, texts: Mapping[str, str]) -> list[dict[str, str]]:
    """Per method what each run did: the steps until the goal, then `texts`, which is key -> format, such as `.2f`."""

    def steps(row: Row) -> str:
        return NEVER if row["steps_to_goal"] is None else str(row["steps_to_goal"])

    def listed(runs: Runs, key: str, form: str) -> str:
        values = [NOTHING if row is None else row[key] for row in runs.values()]
        return ", ".join("none" if x is None else x if isinstance(x, str) else format(x, form) for x in values)

    return [
        {"method": method, "steps": ", ".join(NOTHING if row is None else steps(row) for row in runs.values())}
        | {key: listed(runs, key, form) for key, form in texts.items()}
        for method, runs in results.items()
    ]


def in_order(results: Results, baseline: str, key: str) -> dict[str, Runs]:
    """The baseline, then the others by falling mean difference to it; those without any come last."""

    def place(method: str) -> tuple[bool, float]:
        found = gains(results[method], results[baseline], key)
        return method != baseline, -float(np.mean(found)) if found else np.inf

    return {method: results[method] for method in sorted(results, key=place)}


def judge(results: Results, baseline: str, key: str) -> Judged:
    """Sorts the methods by the interval of their differences to the baseline in one figure."""
    found = Judged([], [], [], [])
    for method, runs in results.items():
        if method == baseline:
            continue
        values = gains(runs, results[baseline], key)
        if len(values) < len(runs):
            found.unjudged.append((method, len(runs) - len(values)))
            continue
        mean, low, high = interval(values)
        (found.above if low > 0 else found.below if high < 0 else found.unclear).append((method, mean))
    found.above.sort(key=lambda x: -x[1])
    found.below.sort(key=lambda x: x[1])
    found.unclear.sort(key=lambda x: -x[1])
    return found


def sentence(results: Results, baseline: str, figure: Figure) -> str:
    """What `judge` finds in one figure, in words, mean differences in brackets."""
    found = judge(results, baseline, figure.key)
    up, down = WORDS[figure.good]

    def listed(methods: list[tuple[str, float]]) -> str:
        return ", ".join(f"{method} ({mean:+.3f})" for method, mean in methods) or "none"

    text = (
        f"**{figure.heading[0].upper()}{figure.heading[1:]}.** {up} than {baseline}: {listed(found.above)}. "
        f"{down} than {baseline}: {listed(found.below)}. "
        f"Not distinguishable from {baseline}: {listed(found.unclear)}."
    )
    if found.unjudged:
        failed = ", ".join(f"{method} ({number} of {len(results[method])})" for method, number in found.unjudged)
        text += f" Not judged, because runs failed or are missing: {failed}."
    return text


def chance(results: Results, baseline: str, num_figures: int) -> str:
    """How often such intervals exclude 0 where there is no difference, in words."""
    others = [method for method in results if method != baseline]
    if not others:
        return ""
    number, runs = len(others) * num_figures, min(len(results[method]) for method in others)
    text = (
        f"Of intervals of 95 % one in twenty excludes 0 by chance where there is no difference: here "
        f"{0.05 * number:.1f} of {number}."
    )
    if runs == 1:
        return text + " One run of each method tells nothing."
    if 2 ** (1 - runs) > 0.05:
        text += (
            f" With {runs} runs of each method it is more, so that what follows are tendencies: an interval excludes 0 "
            f"as soon as all differences have one sign, which chance does once in {2 ** (runs - 1)}."
        )
    return text

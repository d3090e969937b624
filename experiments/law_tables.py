"""What the study of the law says: figures of its runs, tables, and sentences that are made of them.

Nothing here is written down beforehand but the paper's figures. A run that failed or has no law is in no mean, and is
named. Intervals over runs are Student's t, and runs of one size and warm start are averaged first: estimators begin
with the same parameters there, so that only starts are independent.
"""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jentropy.evaluation import Interval
from jentropy.regression import LawError, mean_interval
from jentropy.report.fit import FRACTIONS, MOMENTS
from jentropy.report.fit import LEVEL as RUN_LEVEL
from jentropy.report.tables import table
from jentropy.theory.law import Coverage, coverage
from jentropy.theory.sizes import SizeLaw, fit_sizes
from jentropy.train.metrics import read_metrics

ESTIMATORS = {"grpo": "GRPO", "rloo": "RLOO", "reinforce_pp": "REINFORCE++"}
BASELINE = "grpo"
COEFFICIENTS = {"a": "a", "b": "b", "ceiling": "ceiling b - a"}
PAPER_CONSUMPTION = {"1/12": {"entropy": 0.73, "reward": 0.76}, "1/3": {"entropy": 0.93, "reward": 0.94}}
PAPER_RMSE, PAPER_FRACTION = 0.02, FRACTIONS[0]
LEDGER = {"lemma1": "Lemma 1", "first_order": "First order in parameters"}
LEVEL = 0.95
"""Of intervals over runs."""


class Run(NamedTuple):
    """What is known of a finished run.

    Attributes:
      size: its name, such as `0.1M`.
      estimator: key of `ESTIMATORS`.
      pair: warm start and seed.
      parameters: of the policy.
      numbers: of `report.fit.fit_curves`.
      points: entropy and reward of its evaluations.
      final: its final evaluation.
      ledger: agreement of each prediction with the measured change; see `agreement`.
    """

    size: str
    estimator: str
    pair: tuple[int, int]
    parameters: int
    numbers: Mapping[str, Any]
    points: tuple[np.ndarray, np.ndarray]
    final: Mapping[str, Any]
    ledger: Mapping[str, "Agreement"]

    @property
    def law(self) -> Mapping[str, Any]:
        """Its coefficients, or `why` there are none."""
        return self.numbers["law"]


class Agreement(NamedTuple):
    """A predicted and the measured change of the entropy, over the steps of one run.

    Attributes:
      steps: entries that have both.
      correlation: Pearson's.
      error: root of the mean squared difference, as a fraction of the root mean squared change.
    """

    steps: int
    correlation: float
    error: float


def agreement(ledger: Path) -> dict[str, Agreement]:
    """How the predictions in a `ledger.jsonl` agree with what was measured; empty without such a file.

    A prediction with fewer than three entries, or whose entries or measurements do not vary, is left out.
    """
    lines, found = read_metrics(ledger), {}
    for name in LEDGER:
        keys = (f"ledger/{name}", "ledger/entropy_change")
        both = np.array([[line[key] for key in keys] for line in lines if all(key in line for key in keys)], float)
        both = both.reshape(-1, 2)[np.isfinite(both.reshape(-1, 2)).all(axis=1)]
        if len(both) >= 3 and (np.ptp(both, axis=0) > 0).all():
            predicted, measured = both.T
            error = np.sqrt(np.mean((predicted - measured) ** 2) / np.mean(measured**2))
            found[name] = Agreement(len(both), float(np.corrcoef(predicted, measured)[0, 1]), float(error))
    return found


def spread_text(values: Sequence[float], form: str = ".3f") -> str | None:
    """Mean and its interval over runs by Student's t; the value alone if there is one."""
    if not values:
        return None
    if len(values) == 1:
        return format(values[0], form)
    mean, _, (low, high) = mean_interval(values, LEVEL)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def over_starts(runs: Sequence[Run], values: Sequence[float]) -> list[float]:
    """Values of runs, averaged over those of one size and pair of warm start and seed."""
    groups: dict[tuple[str, tuple[int, int]], list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        groups.setdefault((run.size, run.pair), []).append(value)
    return [float(np.mean(group)) for group in groups.values()]


def cells(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """The runs that have a law, by size and estimator."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if "why" not in run.law:
            found.setdefault((run.size, run.estimator), []).append(run)
    return found


class Difference(NamedTuple):
    """Of a coefficient under another estimator to that under the baseline, same size, warm start and seed.

    Attributes:
      where: size, estimator and coefficient, in words.
      mean: over pairs.
      interval: joint for all differences of the document, by Bonferroni.
      relative: mean as a fraction of the baseline's coefficient.
    """

    where: str
    mean: float
    interval: Interval
    relative: float


def differences(runs: Sequence[Run]) -> list[Difference]:
    """All differences of a and b to the baseline that at least two pairs of runs have."""
    found, by_cell = [], cells(runs)
    for (size, estimator), there in by_cell.items():
        base = {run.pair: run for run in by_cell.get((size, BASELINE), []) if estimator != BASELINE}
        for name in ("a", "b"):
            pairs = [(run.law[name]["value"], base[run.pair].law[name]["value"]) for run in there if run.pair in base]
            if len(pairs) > 1:
                found.append((f"{size} {ESTIMATORS[estimator]}, {name}", np.array(pairs)))
    level = 1.0 - (1.0 - LEVEL) / max(1, len(found))
    rows = []
    for where, pairs in found:
        mean, _, ends = mean_interval(list(pairs[:, 0] - pairs[:, 1]), level)
        rows.append(Difference(where, mean, ends, mean / abs(float(pairs[:, 1].mean()))))
    return rows


def coverage_of(runs: Sequence[Run], fraction: float) -> Coverage | None:
    """Of the forecasts of all runs; None if none has any."""
    try:
        return coverage([run.points for run in runs], fraction)
    except LawError:
        return None


def size_law(runs: Sequence[Run]) -> SizeLaw | None:
    """The lines in ln N through the runs that have a law; None with fewer than two sizes."""
    there = [run for run in runs if "why" not in run.law]
    a, b = ([run.law[name]["value"] for run in there] for name in ("a", "b"))
    try:
        return fit_sizes([run.parameters for run in there], a, b)
    except LawError:
        return None


def per_run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of every run: the ends of reward and entropy, and its law."""
    rows = []
    for run in runs:
        entropy, reward = run.points
        row: dict[str, Any] = {
            "size": run.size,
            "estimator": ESTIMATORS[run.estimator],
            "pair": "{}, {}".format(*run.pair),
            "reward": f"{reward[0]:.3f} -> {reward[-1]:.3f}",
            "entropy": f"{entropy[0]:.3f} -> {entropy[-1]:.3f}",
            "points": run.numbers["points"],
        }
        if "why" in run.law:
            row["a"] = run.law["why"]
        else:
            for name in ("a", "b"):
                row[name] = "{value:.3f} ± {stderr:.3f}".format(**run.law[name])
            ceiling = run.law["ceiling"]
            row["ceiling"] = "{:.3f} [{:.3f}, {:.3f}]".format(ceiling["value"], *ceiling["interval"])
            row |= {"r2": run.law["r_squared"], "rmse": f"{run.law['rmse']:.4f}"}
        rows.append(row)
    return rows


def coefficient_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Means of the coefficients by size and estimator."""
    return [
        {"size": size, "parameters": f"{there[0].parameters:,}", "estimator": ESTIMATORS[estimator], "runs": len(there)}
        | {name: spread_text([run.law[name]["value"] for run in there]) for name in COEFFICIENTS}
        | {"r2": float(np.mean([run.law["r_squared"] for run in there]))}
        for (size, estimator), there in cells(runs).items()
    ]


def forecast_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Error and coverage of the forecasts, by size and of all runs."""
    rows = []
    sizes = list(dict.fromkeys(run.size for run in runs))
    for size, fraction in itertools.product([*sizes, None] if len(sizes) > 1 else sizes, FRACTIONS):
        there = [run for run in runs if size in (run.size, None)]
        found = coverage_of(there, fraction)
        row: dict[str, Any] = {"size": size or "all", "fraction": f"{fraction:.0%}", "runs": 0}
        if found is not None:
            ahead = [run for index, run in enumerate(there) if index not in found.refused]
            row |= {"runs": len(ahead), "rmse": spread_text(over_starts(ahead, found.rmse), ".4f")}
            row["worst"] = f"{max(found.rmse):.4f}"
            row |= {"covered": "{:.0%} [{:.0%}, {:.0%}]".format(found.covered, *found.interval)}
            row |= {"below": f"{sum(x < PAPER_RMSE for x in found.rmse)} of {len(found.rmse)}"}
        rows.append(row)
    return rows


def size_rows(law: SizeLaw) -> list[dict[str, Any]]:
    """The lines in ln N, and a policy three times as large as the largest."""
    rows, further = [], 3.0 * law.sizes[-1]
    try:
        ahead = law.predict(further, LEVEL)
    except LawError:
        ahead = {}
    for name, line in (("a", law.a), ("b", law.b), ("ceiling", law.ceiling)):
        row = {"name": COEFFICIENTS[name], "intercept": f"{line.intercept:.3f}", "slope": f"{line.slope:+.4f}"}
        if ahead:
            row["error"] = f"{np.sqrt(line.variance):.4f}"
            row["ahead"] = "{:.3f} [{:.3f}, {:.3f}]".format(ahead[name].value, *ahead[name].interval)
        rows.append(row)
    return rows


class Held(NamedTuple):
    """A coefficient of the largest size, predicted from the line through the smaller ones.

    Attributes:
      predicted: by the line.
      measured: mean over runs.
      interval: of that mean, over starts; None for one start.
    """

    predicted: float
    measured: float
    interval: Interval | None


def held_out(runs: Sequence[Run]) -> dict[str, Held]:
    """The test of the extrapolation: the largest size from the others; empty with fewer than three sizes."""
    there = [run for run in runs if "why" not in run.law]
    sizes = sorted({run.parameters for run in there})
    law = size_law([run for run in there if run.parameters != sizes[-1]]) if len(sizes) > 2 else None
    if law is None:
        return {}
    found = {}
    for name, line in (("a", law.a), ("b", law.b), ("ceiling", law.ceiling)):
        last = [run for run in there if run.parameters == sizes[-1]]
        values = over_starts(last, [run.law[name]["value"] for run in last])
        interval = mean_interval(values, LEVEL)[2] if len(values) > 1 else None
        found[name] = Held(float(line.predict(np.log(sizes[-1]))), float(np.mean(values)), interval)
    return found


def consumption_values(runs: Sequence[Run], moment: str, key: str) -> list[float]:
    """Entropy spent or reward gained at a moment by the runs that spent and gained, averaged over each start."""
    there = [run for run in runs if "why" not in run.numbers["consumption"]]
    return over_starts(there, [run.numbers["consumption"][moment][key] for run in there])


def consumption_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Means by size."""
    rows = []
    for size in dict.fromkeys(run.size for run in runs):
        there = [run for run in runs if run.size == size]
        row: dict[str, Any] = {"size": size}
        row["runs"] = sum("why" not in run.numbers["consumption"] for run in there)
        for moment, key in itertools.product(MOMENTS, ("entropy", "reward")):
            row[f"{moment} {key}"] = spread_text(consumption_values(there, moment, key), ".0%")
        rows.append(row)
    return rows


def ledger_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Agreement of predicted and measured change of the entropy, by size and estimator."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.size, run.estimator), []).append(run)
    rows = []
    for ((size, estimator), there), (name, called) in itertools.product(groups.items(), LEDGER.items()):
        found = [run.ledger[name] for run in there if name in run.ledger]
        if found:
            row = {"size": size, "estimator": ESTIMATORS[estimator], "prediction": called, "runs": len(found)}
            row |= {"steps": sum(each.steps for each in found)}
            row |= {"mean": float(np.mean([each.correlation for each in found]))}
            row |= {"least": min(each.correlation for each in found)}
            rows.append(row | {"error": f"{np.mean([each.error for each in found]):.1%}"})
    return rows


def paper_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The paper's statements, its figures, and what they are here."""
    rows = [_independence_row(runs)]
    for moment, key in itertools.product(MOMENTS, ("entropy", "reward")):
        values, paper = consumption_values(runs, moment, key), PAPER_CONSUMPTION[moment][key]
        what = f"{key} {'spent' if key == 'entropy' else 'gained'} at {moment} of the steps"
        rows.append({"what": what, "paper": f"{paper:.0%}", **_against(values, paper)})
    return [*rows, _forecast_row(runs), *_size_verdicts(runs)]


def _forecast_row(runs: Sequence[Run]) -> dict[str, str]:
    found = coverage_of(runs, PAPER_FRACTION)
    row = {"what": f"RMSE of the forecast from the first {PAPER_FRACTION:.0%}", "paper": f"below {PAPER_RMSE:.0%}"}
    if found is None:
        return row | {"here": "no forecast", "verdict": "not tested"}
    mean, below = float(np.mean(found.rmse)), sum(x < PAPER_RMSE for x in found.rmse)
    row["here"] = f"{mean:.1%}, below {PAPER_RMSE:.0%} in {below} of {len(found.rmse)} runs"
    return row | {"verdict": "reproduces" if mean < PAPER_RMSE else "does not reproduce"}


def _independence_row(runs: Sequence[Run]) -> dict[str, str]:
    row, found = {"what": "a and b under another algorithm", "paper": "the same"}, differences(runs)
    if not found:
        return row | {"here": "no two estimators with at least two runs each", "verdict": "not tested"}
    apart = [each for each in found if each.interval[0] > 0 or each.interval[1] < 0]
    largest = max(found, key=lambda each: abs(each.relative))
    row["here"] = f"{len(apart)} of {len(found)} differences not 0, largest {largest.relative:+.1%} ({largest.where})"
    return row | {"verdict": "does not reproduce" if apart else "no difference found"}


def _against(values: Sequence[float], paper: float) -> dict[str, str]:
    if len(values) < 2:
        return {"here": spread_text(values, ".0%") or "no run", "verdict": "not tested"}
    _, _, (low, high) = mean_interval(values, LEVEL)
    verdict = "more here" if low > paper else "less here" if high < paper else "reproduces"
    return {"here": spread_text(values, ".0%") or "", "verdict": verdict}


def _size_verdicts(runs: Sequence[Run]) -> list[dict[str, str]]:
    rows = []
    for name, held in held_out(runs).items():
        row = {"what": f"{COEFFICIENTS[name]} of the largest policy from ln N of the others", "paper": "on a line"}
        row["here"] = f"predicted {held.predicted:.3f}, measured {held.measured:.3f}"
        verdict = "not tested"
        if held.interval is not None:
            low, high = held.interval
            row["here"] += f" [{low:.3f}, {high:.3f}]"
            verdict = "reproduces" if low <= held.predicted <= high else "does not reproduce"
        rows.append(row | {"verdict": verdict})
    return rows or [{
        "what": "a and b of the largest policy from ln N of the others", "paper": "on a line",
        "here": "fewer than three sizes", "verdict": "not tested",
    }]  # fmt: skip


def statements(runs: Sequence[Run]) -> list[str]:
    """What the figures say, as sentences."""
    by_verdict: dict[str, list[str]] = {}
    for row in paper_rows(runs):
        by_verdict.setdefault(row["verdict"], []).append(f"{row['what']}: {row['here']} (paper: {row['paper']})")
    said = [f"**{verdict[0].upper()}{verdict[1:]}**: {'; '.join(whats)}." for verdict, whats in by_verdict.items()]
    r2 = [run.law["r_squared"] for run in runs if "why" not in run.law]
    if r2:
        least = f"{np.mean(r2):.3f} in the mean of {len(r2)} runs, at least {min(r2):.3f}"
        said.append(f"**The fit**: {len(r2)} of {len(runs)} runs have a law, with an R² of {least}.")
    for fraction in FRACTIONS:
        found = coverage_of(runs, fraction)
        if found is not None:
            low, high = found.interval
            verdict = "too few" if high < found.level else "too many" if low > found.level else "not distinguishable"
            said.append(
                f"**Intervals of the forecast from the first {fraction:.0%}**: {found.covered:.0%} [{low:.0%}, "
                f"{high:.0%}] of {found.num_points} later evaluations lie in theirs of {found.level:.0%}: {verdict}."
            )
    for name, called in LEDGER.items():
        found = [run.ledger[name].correlation for run in runs if name in run.ledger]
        if found:
            said.append(
                f"**{called}**: correlation with the measured change of the entropy {np.mean(found):.3f} in the mean "
                f"of {len(found)} runs, at least {min(found):.3f}; {sum(x >= 0.98 for x in found)} of them reach .98."
            )
    return [textwrap.fill(f"- {text}", 120, subsequent_indent="  ") for text in said]


def _paper_section(runs: Sequence[Run]) -> list[str]:
    about = f"""
        Verdicts are made of the {LEVEL:.0%} intervals over warm starts and seeds. Those of the differences to
        {ESTIMATORS[BASELINE]}, of the same size, warm start and seed, hold for all of them together (Bonferroni); that
        none is found does not mean that there is none. Consumption and forecasts are compared in their means."""
    columns = {"what": "", "paper": "paper", "here": "here", "verdict": "verdict"}
    return ["## Beside the paper", table(paper_rows(runs), columns), textwrap.fill(" ".join(about.split()), 120)]


def _coefficient_section(runs: Sequence[Run]) -> list[str]:
    columns = {"size": "size", "parameters": "parameters", "estimator": "estimator", "runs": "runs"}
    columns |= {**COEFFICIENTS, "r2": "mean R²"}
    parts = ["## a and b by size and estimator", table(coefficient_rows(runs), columns)]
    rows = [
        {
            "where": each.where,
            "mean": f"{each.mean:+.4f}",
            "interval": "[{:+.4f}, {:+.4f}]".format(*each.interval),
            "relative": f"{each.relative:+.1%}",
        }
        for each in differences(runs)
    ]
    if rows:
        parts.append(f"Differences to {ESTIMATORS[BASELINE]}, with intervals that hold together:")
        columns = {"where": "", "mean": "difference", "interval": "interval", "relative": "of the coefficient"}
        parts.append(table(rows, columns))
    return parts


def _forecast_section(runs: Sequence[Run]) -> list[str]:
    columns = {"size": "size", "fraction": "fitted", "runs": "runs", "rmse": "RMSE", "worst": "largest RMSE"}
    columns |= {"below": f"below {PAPER_RMSE}", "covered": f"in the {RUN_LEVEL:.0%} intervals"}
    return ["## Forecast of the rest from the first evaluations", table(forecast_rows(runs), columns)]


def _size_section(runs: Sequence[Run]) -> list[str]:
    law, heading = size_law(runs), "## Size of the policy"
    if law is None:
        return [heading, "Fewer than two sizes have a law: there is no line in ln N."]
    columns = {"name": "", "intercept": "at ln N = 0", "slope": "per ln N", "error": "residual error"}
    parts = [heading, table(size_rows(law), {**columns, "ahead": f"at N = {3 * law.sizes[-1]:,.0f}"})]
    if len(law.sizes) == 2:
        parts.append("Two sizes fit any line exactly: there is no error to give.")
    return parts


def _consumption_section(runs: Sequence[Run]) -> list[str]:
    columns = {"size": "size", "runs": "runs"}
    columns |= {f"{m} {key}": f"{key} at {m}" for m, key in itertools.product(MOMENTS, ("entropy", "reward"))}
    return ["## Entropy spent and reward gained by fractions of the steps", table(consumption_rows(runs), columns)]


def _ledger_section(runs: Sequence[Run]) -> list[str]:
    columns = {"size": "size", "estimator": "estimator", "prediction": "prediction", "runs": "runs", "steps": "steps"}
    columns |= {"mean": "mean correlation", "least": "least correlation", "error": "relative error"}
    rows = ledger_rows(runs)
    said = table(rows, columns) if rows else "No run has a `ledger.jsonl` with these predictions."
    return ["## Predicted and measured change of the entropy", said]


def _run_section(runs: Sequence[Run]) -> list[str]:
    columns = {"size": "size", "estimator": "estimator", "pair": "warm start, seed", "reward": "held-out reward"}
    columns |= {"entropy": "entropy, nats", "points": "points", "a": "a", "b": "b", "ceiling": "ceiling b - a"}
    return ["## Each run", table(per_run_rows(runs), {**columns, "r2": "R²", "rmse": "RMSE"})]


def sections(runs: Sequence[Run]) -> list[str]:
    """The Markdown after the head of the document."""
    if not runs:
        return ["No run has finished."]
    makers = (_paper_section, _coefficient_section, _forecast_section, _size_section, _consumption_section)
    parts = ["## What it says", "\n".join(statements(runs))]
    return parts + [part for make in (*makers, _ledger_section, _run_section) for part in make(runs)]

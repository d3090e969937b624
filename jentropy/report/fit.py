"""`jentropy fit`: the law R = -a exp(H) + b of runs, as numbers, tables and a picture.

A curve is one stage of one run: the law is a statement about one task. Its points are the evaluations of the stage, in
the order of the steps. What cannot be said of a curve is said in words, and there is no number for it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jentropy.regression import FloatArray, mean_interval
from jentropy.report.plots import COLOURS, DASHES, law_curves
from jentropy.report.tables import table
from jentropy.theory.consumption import entropy_consumption
from jentropy.theory.law import LawError, bootstrap_intervals, fit_law, fit_run, forecast
from jentropy.train.metrics import read_metrics

FRACTIONS = (0.15, 0.2, 0.3)
"""Of a curve's evaluations, the first, from which the rest is forecast."""
MOMENTS = {"1/12": 1 / 12, "1/3": 1 / 3}
"""Fractions of a curve's steps at which the entropy spent and the reward gained are looked up."""
LEVEL = 0.9
"""Of all intervals."""
_MAX_BANDS, _MAX_LABELS = 3, 8
_WORLD = re.compile(r"(policy|task\.(?!data_dir)|stages\.\d+\.(mixture|options))\b")
_COEFFICIENTS = ("a", "b", "ceiling")


class Curve(NamedTuple):
    """The evaluations of one stage of one run.

    Attributes:
      name: of the run, and of the stage if the run has several.
      run: its folder.
      stage: name of the stage.
      world: those lines of the run's config on which a and b may depend: the policy and its data.
      step: `[n]`, increasing.
      entropy: `[n]`, nats.
      reward: `[n]`.
      num_known: the first points, up to `--until`; the others only test a forecast.
    """

    name: str
    run: Path
    stage: str
    world: tuple[str, ...]
    step: FloatArray
    entropy: FloatArray
    reward: FloatArray
    num_known: int

    @property
    def known(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Step, entropy and reward of the points up to `--until`."""
        k = self.num_known
        return self.step[:k], self.entropy[:k], self.reward[:k]


def read_curves(runs: Sequence[Path], until: int | None = None) -> list[Curve]:
    """The curves of all runs, in their order.

    Args:
      runs: folders; one that is given twice counts once.
      until: last step that is known; None if all are.

    Raises:
      ValueError: a folder is no run, or its metrics are damaged; it is named.
    """
    folders = list(dict.fromkeys(Path(run) for run in runs))
    ends = [folder.resolve().name for folder in folders]
    curves = []
    for folder, end in zip(folders, ends):
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise ValueError(f"{folder} holds no run: no metrics.jsonl")
        name = end if ends.count(end) == 1 else str(folder)
        stages = law_curves(read_metrics(path))
        for stage, (step, entropy, reward) in stages.items():
            known = step.size if until is None else int((step <= until).sum())
            called = f"{name}, {stage}" if len(stages) > 1 else name
            curves.append(Curve(called, folder, str(stage), _world(folder), step, entropy, reward, known))
        if not stages:
            empty = np.zeros(0)
            curves.append(Curve(name, folder, "", _world(folder), empty, empty, empty, 0))
    return curves


def _world(folder: Path) -> tuple[str, ...]:
    path = folder / "config.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return tuple(line for line in lines if _WORLD.match(line))


def fit_curves(curves: Sequence[Curve], until: int | None = None) -> dict[str, Any]:
    """All numbers of `jentropy fit`, as plain values: what `law.json` holds.

    Args:
      curves: see `read_curves`.
      until: the step that `read_curves` was given.

    Returns:
      `until`, `level`, `curves` with a mapping per curve, and `together` with one for every set of curves that are the
      same stage of the same policy on the same data, where at least two of them have a law. A mapping has `law`,
      `forecasts` and `consumption`, each with `why` instead of numbers where it has none; without a law there is
      nothing else.
    """
    rows = [_curve_row(curve, until) for curve in curves]
    groups: dict[tuple, list[int]] = {}
    for index, curve in enumerate(curves):
        groups.setdefault((curve.stage, curve.world), []).append(index)
    together = []
    for group in groups.values():
        there = [index for index in group if "why" not in rows[index]["law"]]
        if len(there) > 1:
            row = _together_row([curves[index] for index in there], [rows[index] for index in there])
            together.append({**row, "num_without_law": len(group) - len(there)})
    return {"until": until, "level": LEVEL, "curves": rows, "together": together}


def _curve_row(curve: Curve, until: int | None) -> dict[str, Any]:
    step, entropy, reward = curve.known
    found = {"name": curve.name, "run": str(curve.run), "stage": curve.stage, "points": curve.num_known}
    found["law"] = _or_why(lambda: _law(entropy, reward))
    if "why" in found["law"]:
        none = {"why": "no law"}
        return found | {"forecasts": [part | none for part, _ in _parts(curve, until)], "consumption": none}
    forecasts = [
        part | _or_why(lambda number=number: _forecast(curve, number)) for part, number in _parts(curve, until)
    ]
    return found | {"forecasts": forecasts, "consumption": _or_why(lambda: _consumption(step, entropy, reward))}


def _parts(curve: Curve, until: int | None) -> list[tuple[dict[str, Any], int]]:
    """The beginnings from which the rest is forecast, and the number of points in each."""
    if until is not None:
        return [({"until": until}, curve.num_known)]
    return [({"fraction": fraction}, int(fraction * curve.num_known)) for fraction in FRACTIONS]


def _or_why(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return compute()
    except LawError as error:
        return {"why": str(error)}


def _law(entropy: FloatArray, reward: FloatArray) -> dict[str, Any]:
    if not entropy.size:
        raise LawError("no evaluation with a held-out reward and an entropy")
    law, intervals = fit_run(entropy, reward), bootstrap_intervals(entropy, reward, 0, level=LEVEL)
    stderrs = (law.a_stderr, law.b_stderr, law.ceiling_stderr)
    found = {
        name: {"value": getattr(law, name), "stderr": stderr, "interval": list(interval)}
        for name, stderr, interval in zip(_COEFFICIENTS, stderrs, intervals)
    }
    return {**found, "r_squared": law.r_squared, "rmse": law.rmse}


def _forecast(curve: Curve, num_fitted: int) -> dict[str, Any]:
    found = forecast(curve.entropy, curve.reward, num_fitted=num_fitted, level=LEVEL)
    names = ("num_predicted", "rmse", "bias", "covered")
    return {"num_fitted": num_fitted} | {name: getattr(found, name) for name in names}


def _consumption(step: FloatArray, entropy: FloatArray, reward: FloatArray) -> dict[str, Any]:
    rows = entropy_consumption(step, entropy, reward, tuple(MOMENTS.values()))
    return {name: {"entropy": r.entropy_fraction, "reward": r.reward_fraction} for name, r in zip(MOMENTS, rows)}


def _together_row(curves: Sequence[Curve], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over runs, with errors and intervals over runs; R² and RMSE are of one law through all points."""
    found: dict[str, Any] = {"stage": curves[0].stage, "runs": [row["name"] for row in rows]}
    found["points"] = sum(curve.num_known for curve in curves)
    law: dict[str, Any] = {}
    for name in _COEFFICIENTS:
        mean, stderr, interval = mean_interval([row["law"][name]["value"] for row in rows], LEVEL)
        law[name] = {"value": mean, "stderr": stderr, "interval": list(interval)}
    pooled = fit_law(*(np.concatenate([curve.known[i] for curve in curves]) for i in (1, 2)))
    found["law"] = law | {"r_squared": pooled.r_squared, "rmse": pooled.rmse}
    found["forecasts"] = []
    for same in zip(*(row["forecasts"] for row in rows)):
        part = {key: same[0][key] for key in ("fraction", "until") if key in same[0]}
        found["forecasts"].append({**part, **_means(same, ("rmse", "bias", "covered"), "no run has a forecast")})
    spent = [row["consumption"] for row in rows]
    keys = ("entropy", "reward")
    moments = {moment: _means([each.get(moment, each) for each in spent], keys, "") for moment in MOMENTS}
    nothing = all("why" in each for each in spent)
    found["consumption"] = {"why": "no run has spent entropy and gained reward"} if nothing else moments
    return found


def _means(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], why: str) -> dict[str, Any]:
    """Means of those rows that have numbers, and how many they are."""
    there = [row for row in rows if "why" not in row]
    if not there:
        return {"why": why}
    return {"num_runs": len(there)} | {key: float(np.mean([row[key] for row in there])) for key in keys}


def text(found: Mapping[str, Any]) -> str:
    """The tables of `fit_curves`, and in words what is not in them."""
    until = found["until"]
    groups = [{**row, "name": _name_of_mean(row, found)} for row in found["together"]]
    rows = [*found["curves"], *groups]
    law = [{"run": row["name"], "points": row["points"], **_law_cells(row["law"])} for row in rows]
    columns = {"run": "run", "points": "points", "a": "a", "b": "b", "ceiling": "ceiling b - a"}
    parts = [
        "R = -a exp(H) + b" + (f", of the evaluations up to step {until}" if until is not None else "")
        + f": ± standard error, [{LEVEL:.0%} interval]",
        table(law, {**columns, "r_squared": "R²", "rmse": "RMSE"}),
        f"Error (RMSE) of the reward forecast from the first evaluations, and how much of the rest lies in its "
        f"{LEVEL:.0%} interval;\nentropy spent / reward gained by fractions of the steps",
    ]  # fmt: skip
    headings = {"run": "run"}
    cells = [{"run": row["name"], **_forecast_cells(row), **_consumption_cells(row["consumption"])} for row in rows]
    headings |= {key: key for row in cells for key in row}
    parts.append(table(cells, headings))
    if groups:
        parts.append(
            "Means are over the runs of one stage, policy and data that have a law, with errors and intervals over\n"
            "runs (Student's t); R² and RMSE are of one law through all their points. The errors of single runs do\n"
            "not know that their points are correlated."
        )
    notes: dict[str, list[str]] = {}
    for row in found["curves"]:
        for why in _missing(row):
            notes.setdefault(why, []).append(row["name"])
    return "\n\n".join(
        [*parts, "\n".join(f"{_listed(names)}: {why}" for why, names in notes.items())] if notes else parts
    )


def _name_of_mean(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    number, without = len(row["runs"]), row["num_without_law"]
    stage = f", {row['stage']}" if len({curve["stage"] for curve in found["curves"]}) > 1 else ""
    return f"mean of {number}" + (f" of {number + without}" if without else "") + stage


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _law_cells(law: Mapping[str, Any]) -> dict[str, Any]:
    if "why" in law:
        return {}
    cells: dict[str, Any] = {
        name: "{:.3f} ± {:.3f} [{:.3f}, {:.3f}]".format(law[name]["value"], law[name]["stderr"], *law[name]["interval"])
        for name in _COEFFICIENTS
    }
    return cells | {"r_squared": law["r_squared"], "rmse": f"{law['rmse']:.4f}"}


def _part(forecast: Mapping[str, Any]) -> str:
    return f"first {forecast['fraction']:.0%}" if "fraction" in forecast else f"steps <= {forecast['until']}"


def _forecast_cells(row: Mapping[str, Any]) -> dict[str, str | None]:
    return {
        _part(each): None if "why" in each else f"{each['rmse']:.4f}, {each['covered']:.0%} in"
        for each in row["forecasts"]
    }


def _consumption_cells(consumption: Mapping[str, Any]) -> dict[str, str | None]:
    return {
        f"at {moment}": None if "why" in consumption
        else f"{consumption[moment]['entropy']:.0%} / {consumption[moment]['reward']:.0%}"
        for moment in MOMENTS
    }  # fmt: skip


def _missing(row: Mapping[str, Any]) -> list[str]:
    """Why there are no numbers."""
    if "why" in row["law"]:
        return [f"no law: {row['law']['why']}"]
    whys = {f"no forecast, {_part(each)}": each.get("why") for each in row["forecasts"]}
    whys |= {"nothing consumed": row["consumption"].get("why")}
    return [f"{what}: {why}" for what, why in whys.items() if why]


def law_plot(curves: Sequence[Curve], found: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Draws reward against entropy with the fits, and reward against steps with what was forecast.

    Open circles are points after `--until`, which no fit has seen. Bands are prediction intervals of the law, and of
    the forecast from the last of `FRACTIONS`; they are drawn for at most three curves.
    """
    figure = Figure(figsize=(11.0, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for index, (curve, row) in enumerate(zip(curves, found["curves"])):
        colour = COLOURS[index % len(COLOURS)]
        style = {"color": colour, "linestyle": DASHES[index % len(DASHES)], "linewidth": 1.7}
        for axes, x in ((left, curve.entropy), (right, curve.step)):
            for part, face in ((slice(curve.num_known), colour), (slice(curve.num_known, None), "none")):
                axes.scatter(x[part], curve.reward[part], s=26, facecolors=face, edgecolors=colour, alpha=0.55)
        if index < _MAX_LABELS:
            left.plot([], [], **style, label=curve.name + (": no law" if "why" in row["law"] else ""))
        is_banded = len(curves) <= _MAX_BANDS
        if "why" not in row["law"]:
            _, entropy, reward = curve.known
            x = np.linspace(0.0, 1.03 * curve.entropy.max(), 200)
            law = fit_law(entropy, reward)
            _draw_band(left, x, (law.predict(x), *law.prediction_interval(x, LEVEL)), style, is_banded)
        last = row["forecasts"][-1]
        if "why" not in last:
            ahead = forecast(curve.entropy, curve.reward, num_fitted=last["num_fitted"], level=LEVEL)
            steps = curve.step[-ahead.num_predicted :]
            _draw_band(right, steps, (ahead.predicted, ahead.low, ahead.high), style, is_banded)
    title = f"Forecast from the first {FRACTIONS[-1]:.0%} of the evaluations"
    if found["until"] is not None:
        title = f"Forecast from the evaluations up to step {found['until']}"
    for axes, heading, xlabel in ((left, "Reward against entropy", "policy entropy, nats"), (right, title, "step")):
        axes.set_title(heading, fontsize=11, loc="left")
        axes.set(xlabel=xlabel, ylabel="held-out reward")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    left.set_xlim(left=0.0)
    right.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if curves:
        left.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor="none")
    figure.savefig(path)


def _draw_band(
    axes: Axes,
    x: FloatArray,
    band: tuple[FloatArray, FloatArray, FloatArray],
    style: Mapping[str, Any],
    is_banded: bool,
) -> None:
    """A line, with its interval if wanted."""
    middle, low, high = band
    axes.plot(x, middle, **style)
    if is_banded:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def write_fit(runs: Sequence[Path], out: Path | None = None, until: int | None = None) -> str:
    """Fits the runs, writes `law.json` and `law.png` to `out`, and returns the tables and where the files are.

    Args:
      runs: folders, at least one.
      out: folder of the files; that of the run by default, or `runs/fit` for several.
      until: last step that is known; None if all are.

    Raises:
      ValueError: as in `read_curves`.
    """
    curves = read_curves(runs, until)
    found = fit_curves(curves, until)
    folders = {curve.run for curve in curves}
    out = out or (folders.pop() if len(folders) == 1 else Path("runs") / "fit")
    out.mkdir(parents=True, exist_ok=True)
    (out / "law.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    law_plot(curves, found, out / "law.png")
    return f"{text(found)}\n\nPicture: {out / 'law.png'}\nNumbers: {out / 'law.json'}"

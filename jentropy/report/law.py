"""The law R = -a exp(H) + b in a report: points, fits, and what the first part of a run says of the rest."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jentropy.report import html, svg
from jentropy.report.curves import MAX_LEGEND, Group, spread
from jentropy.report.html import number
from jentropy.report.plots import law_points
from jentropy.report.svg import FloatArray, Series
from jentropy.theory.law import Forecast, Law, LawError, bootstrap_intervals, fit_run, forecast

FRACTION = 0.3
"""Of a stage's evaluations, the first, from which the rest is forecast."""
SHARE = f"{FRACTION:.0%}".replace("%", " %")
MAX_POINTS = 300
MAX_FORECASTS = 6


class Fit(NamedTuple):
    """One stage of one run.

    Attributes:
      folder: of the run.
      entropy: `[n]`, nats.
      reward: `[n]`.
      law: the fit, or why there is none.
      ahead: the forecast from the first `FRACTION` of the points, or why there is none.
    """

    folder: str
    entropy: FloatArray
    reward: FloatArray
    law: Law | LawError
    ahead: Forecast | LawError


def law_section(groups: Sequence[Group]) -> str:
    """Charts and tables of all stages with evaluations."""
    stages: dict[str, list[tuple[Group, list[Fit]]]] = {}
    for group in groups:
        found: dict[str, list[Fit]] = {}
        for run in group.runs:
            for stage, (entropy, reward) in law_points(run.metrics).items():
                found.setdefault(str(stage), []).append(_fit(run.folder, entropy, reward))
        for stage, fits in found.items():
            stages.setdefault(stage, []).append((group, fits))
    if not stages:
        return html.paragraph("No evaluation with a held-out reward and an entropy: nothing to fit.")
    sentence = (
        "Each point is an evaluation: held-out reward against policy entropy. R = -a exp(H) + b is fitted to every run "
        "and stage, and a, b and the ceiling b - a (the reward at zero entropy) are averaged over runs. The law "
        "describes training without control of the entropy; where a method controls it, R² says how little is left of "
        f"it. Forecast: the law fitted to the first {SHARE} of a stage's evaluations, and on the rest its error, its "
        "bias (predicted minus measured) and the share of the measured rewards in its 90 % prediction intervals."
    )
    parts = [html.paragraph(sentence, "soft")]
    pictures = [_chart(stage, found) for stage, found in stages.items()]
    parts.append(f'<div class="grid">{"".join(pictures)}</div>')
    rows = [_row(stage, group, fits) for stage, found in stages.items() for group, fits in found]
    columns = {
        "method": "method", "stage": "stage", "runs": "fits", "points": "evaluations", "a": "a", "b": "b",
        "ceiling": "ceiling", "r_squared": "R²", "rmse": "forecast: RMSE", "bias": "bias",
        "covered": "in the interval", "ahead": "ceiling of the forecast",
    }  # fmt: skip
    parts.append(html.table(rows, columns))
    parts.append(html.notes([*_reading(), *_reasons(stages)]))
    return "".join(parts) + _forecasts(stages)


def _fit(folder: str, entropy: FloatArray, reward: FloatArray) -> Fit:
    try:
        law = fit_run(entropy, reward)
    except LawError as error:
        law = error
    try:
        ahead = forecast(entropy, reward, fraction=FRACTION)
    except LawError as error:
        ahead = error
    return Fit(folder, entropy, reward, law, ahead)


def _laws(fits: Sequence[Fit]) -> list[Law]:
    return [fit.law for fit in fits if isinstance(fit.law, Law)]


def _chart(stage: str, found: Sequence[tuple[Group, list[Fit]]]) -> str:
    series = []
    for group, fits in found:
        entropy, reward = np.concatenate([f.entropy for f in fits]), np.concatenate([f.reward for f in fits])
        thin = slice(None, None, -(-entropy.size // MAX_POINTS))
        series.append(
            Series(group.label, entropy[thin], reward[thin], group.style, line=False, marks=True, hollow=True)
        )
        laws = _laws(fits)
        if laws:
            x = np.linspace(0.0, float(entropy.max()), 60)
            mean = np.mean([law.predict(x) for law in laws], axis=0)
            series.append(Series(f"{group.label}, fit", x, mean, group.style))
    picture = svg.chart(
        series, title=f"Held-out reward against entropy, stage {stage}", xlabel="policy entropy, nats",
        ylabel="held-out reward", at_least=(0.0, 1.0),
    )  # fmt: skip
    entries = [(svg.swatch(group.style, hollow=True), group.label) for group, _ in found]
    return html.figure(picture, f"Stage {stage}", html.legend(entries) if 1 < len(found) <= MAX_LEGEND else "")


def _row(stage: str, group: Group, fits: Sequence[Fit]) -> dict[str, object]:
    laws = _laws(fits)
    ahead = [fit.ahead for fit in fits if isinstance(fit.ahead, Forecast)]
    row: dict[str, object] = {
        "method": html.Html(svg.swatch(group.style) + html.text(group.label)),
        "stage": stage,
        "runs": str(len(laws)) if len(laws) == len(fits) else f"{len(laws)} of {len(fits)}",
        "points": ", ".join(dict.fromkeys(str(fit.entropy.size) for fit in fits)),
        "rmse": spread([f.rmse for f in ahead]),
        "bias": spread([f.bias for f in ahead]),
        "covered": spread([f.covered for f in ahead]),
        "ahead": spread([f.law.ceiling for f in ahead]),
    }
    if len(laws) == 1:
        law = laws[0]
        row |= {"a": f"{number(law.a)} ± {law.a_stderr:.3f}", "b": f"{number(law.b)} ± {law.b_stderr:.3f}"}
        row["ceiling"] = _ceiling(next(fit for fit in fits if fit.law is law), law)
    elif laws:
        row |= {key: spread([getattr(law, key) for law in laws]) for key in ("a", "b", "ceiling")}
    return row | {"r_squared": spread([law.r_squared for law in laws if np.isfinite(law.r_squared)])}


def _reading() -> list[str]:
    return [
        "One run: a and b with their standard errors, and the 90 % bootstrap interval of the ceiling over its points, "
        "which takes no account of their order in time. Two runs: the mean (smaller to larger). Three or more: the "
        "mean and its 95 % bootstrap interval over runs."
    ]


def _ceiling(fit: Fit, law: Law) -> str:
    """The ceiling of one run with its interval, where there is one."""
    try:
        low, high = bootstrap_intervals(fit.entropy, fit.reward, 0).ceiling
    except LawError:
        return number(law.ceiling)
    return f"{number(law.ceiling)} [{number(low)}, {number(high)}]"


def _reasons(stages: dict[str, list[tuple[Group, list[Fit]]]]) -> list[str]:
    """Why fits and forecasts are missing."""
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for stage, members in stages.items():
        for group, fits in members:
            for what, results in (("fit", [f.law for f in fits]), ("forecast", [f.ahead for f in fits])):
                for error in (r for r in results if isinstance(r, LawError)):
                    counts = found.setdefault((stage, what, str(error)), {})
                    counts[group.label] = counts.get(group.label, 0) + 1
    named = {
        key: ", ".join(f"{k} ({n} runs)" if n > 1 else k for k, n in counts.items()) for key, counts in found.items()
    }
    return [f"Stage {stage}: no {what} of {names}: {error}." for (stage, what, error), names in named.items()]


def _forecasts(stages: dict[str, list[tuple[Group, list[Fit]]]]) -> str:
    """Measured and forecast reward of the first run of each method and stage that has a forecast."""
    chosen = []
    for stage, members in stages.items():
        for group, fits in members:
            fit = next((fit for fit in fits if isinstance(fit.ahead, Forecast)), None)
            if fit is not None:
                chosen.append((stage, group, fit))
    if not chosen:
        return ""
    pictures = [_forecast_chart(*one) for one in chosen[:MAX_FORECASTS]]
    sentence = (
        f"Forecast of the reward from the entropy, by the law fitted to the evaluations left of the dotted line (the "
        f"first {SHARE}); one run of each method. The band is the 90 % prediction interval, cut off far outside [0, 1]."
    )
    left = [f"Not drawn: {len(chosen) - MAX_FORECASTS} more forecasts."] if len(chosen) > MAX_FORECASTS else []
    return (
        f"<h3>Forecast</h3>{html.paragraph(sentence, 'soft')}"
        f'<div class="grid">{"".join(pictures)}</div>{html.notes(left)}'
    )


def _forecast_chart(stage: str, group: Group, fit: Fit) -> str:
    assert isinstance(fit.ahead, Forecast)
    law, at, rest = fit.ahead.law, np.arange(1.0, fit.reward.size + 1), fit.ahead.law.num_points
    blank = np.full(rest, np.nan)
    low, high = (np.concatenate([blank, np.clip(end, -0.5, 1.5)]) for end in (fit.ahead.low, fit.ahead.high))
    series = [
        Series("forecast", at, law.predict(fit.entropy), 1, low, high),
        Series("measured", at, fit.reward, 0, line=False, marks=True, hollow=True),
    ]
    title = f"{group.label}, stage {stage}" + (f", {fit.folder}" if len(group.runs) > 1 else "")
    picture = svg.chart(
        series, title=f"Measured and forecast reward: {title}", xlabel="evaluation of the stage",
        ylabel="held-out reward", at_least=(0.0, 1.0), verticals=[rest + 0.5], integer=True,
    )  # fmt: skip
    entries = [(svg.swatch(0, line=False, hollow=True), "measured"), (svg.swatch(1, marks=False), "forecast")]
    return html.figure(picture, title, html.legend(entries))

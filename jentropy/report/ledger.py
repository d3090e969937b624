"""The entropy ledger in a report: measured change of the entropy beside what theory predicts, and which tokens made it.

Reads the lines of `ledger.jsonl`: `ledger/<quantity>` of whole rollouts and `ledger/<partition>/<part>/<quantity>` of
parts of their tokens, which add up to the whole.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jentropy.report import html, svg
from jentropy.report.curves import Group, Lines, curve, points
from jentropy.report.plots import SMOOTHING
from jentropy.report.svg import Bar, FloatArray, Series

Totals: TypeAlias = Mapping[tuple[str, str], Mapping[str, float]]
"""(partition, quantity) -> part -> contribution of the part, summed over rollouts."""

PREFIX = "ledger/"
CHANGE, LEMMA, FIRST_ORDER = "entropy_change", "lemma1", "first_order"
PREDICTIONS = {LEMMA: "Lemma 1", FIRST_ORDER: "first order in the parameters"}
TITLES = {
    "difficulty": "By difficulty: share of right responses to the prompt",
    "advantage": "By sign of the advantage",
    "clipped": "By clipping",
    "covariance_rank": "By rank of |covariance|",
}
PARTS = {
    "difficulty": {
        "0": "none right", "0.25": "up to 25 %", "0.5": "25 to 50 %", "0.75": "50 to 75 %", "1-": "75 to 100 %",
        "1": "all right",
    },
    "advantage": {"negative": "negative", "zero": "zero", "positive": "positive"},
    "clipped": {"yes": "clipped", "no": "not clipped"},
    "covariance_rank": {
        "0.0002": "top 0.02 %", "0.002": "to 0.2 %", "0.02": "to 2 %", "rest": "the rest",
    },
}  # fmt: skip
"""What parts are called, in their order."""
MAX_GROUPS = 8
MAX_POINTS = 400
HOW = (
    "No run has a ledger.jsonl. It is written when the field `ledger` of a stage is set, for instance to "
    "`fdl.Config(Ledger)` of jentropy.train.ledger: the measured change of the entropy of every rollout, its "
    "predictions, and the tokens that made it."
)


def ledger_section(groups: Sequence[Group]) -> str:
    """Pictures and tables of every method with a ledger."""
    found = [(group, [run.ledger for run in group.runs if run.ledger]) for group in groups]
    found = [(group, runs) for group, runs in found if runs]
    if not found:
        return html.paragraph(HOW)
    sentence = (
        "Change of the policy entropy by all updates of one rollout, at the states of that rollout, in nats: measured, "
        "by Lemma 1 (minus the covariance of log π and the change of the logits), and to first order in the change of "
        f"the parameters. Curves are moving means of {SMOOTHING}, the last one is as recorded. Contributions of the "
        "parts of a partition add up to the whole; they are summed over the recorded rollouts and averaged over runs."
    )
    parts = [html.paragraph(sentence, "soft")]
    for group, runs in found[:MAX_GROUPS]:
        parts.append(f"<h3>{html.text(group.label)}</h3>" if len(groups) > 1 else "")
        totals = _totals(runs)
        parts += [_agreement(runs), _pictures(group, runs, totals), _numbers(totals)]
    left = [group.label for group, _ in found[MAX_GROUPS:]]
    without = [group.label for group in groups if not any(run.ledger for run in group.runs)]
    remarks = [f"Left out, more than {MAX_GROUPS} methods: {', '.join(left)}."] if left else []
    remarks += [f"Without a ledger: {', '.join(without)}."] if without else []
    return "".join(parts) + html.notes(remarks)


def _pairs(lines: Lines, predicted: str) -> FloatArray:
    """Predicted and measured change `[n, 2]` of the rollouts that have both."""
    x, y = points(lines, PREFIX + predicted), points(lines, PREFIX + CHANGE)
    _, i, j = np.intersect1d(x[0], y[0], return_indices=True)
    return np.stack([x[1][i], y[1][j]], axis=1)


def _agreement(runs: Sequence[Lines]) -> str:
    """How well each prediction agrees with what was measured."""
    rows = []
    for key, name in PREDICTIONS.items():
        pairs = np.concatenate([_pairs(lines, key) for lines in runs])
        if not len(pairs):
            continue
        varies = len(pairs) > 2 and min(np.ptp(pairs[:, 0]), np.ptp(pairs[:, 1])) > 0
        error = pairs[:, 0] - pairs[:, 1]
        rows.append(
            {
                "prediction": name, "rollouts": str(len(pairs)),
                "correlation": f"{np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1]:.4f}" if varies else None,
                "rmse": f"{np.sqrt(np.mean(error**2)):.2e}", "size": f"{np.sqrt(np.mean(pairs[:, 1] ** 2)):.2e}",
                "sum": float(pairs[:, 0].sum() / len(runs)), "measured": float(pairs[:, 1].sum() / len(runs)),
            }
        )  # fmt: skip
    columns = {
        "prediction": "prediction", "rollouts": "rollouts", "correlation": "correlation with measured", "rmse": "RMSE",
        "size": "RMS of measured", "sum": "sum predicted", "measured": "sum measured",
    }  # fmt: skip
    return html.table(rows, columns) if rows else ""


def _pictures(group: Group, runs: Sequence[Lines], totals: Totals) -> str:
    """Curves, the scatter of predictions, and bars of every partition."""
    quantities = {CHANGE: "measured", **PREDICTIONS}
    pictures = [
        _lines(runs, quantities, f"{group.label}: change of the entropy per rollout"),
        _scatter(group, runs),
        _lines(
            runs, {"covariance": "tokens", "response_covariance": "responses"},
            f"{group.label}: covariance of log π and advantage",
        ),
    ]  # fmt: skip
    for partition in _partitions(totals):
        pictures.append(_bars(totals, partition, (CHANGE, LEMMA), ("measured (upper bar)", "Lemma 1 (lower bar)")))
    if ("difficulty", "covariance") in totals:
        pictures.append(_bars(totals, "difficulty", ("covariance",), (), mean=True))
    return f'<div class="grid">{"".join(p for p in pictures if p)}</div>'


def _lines(runs: Sequence[Lines], quantities: Mapping[str, str], title: str) -> str:
    drawn = [
        curve(label, i, runs, PREFIX + key, smoothed=key != FIRST_ORDER, marks=key == FIRST_ORDER)
        for i, (key, label) in enumerate(quantities.items())
    ]
    series = [one for one in drawn if one is not None]
    if not series:
        return ""
    picture = svg.chart(series, title=title, xlabel="rollouts", ylabel="nats", at_least=(0.0, 0.0), integer=True)
    return html.figure(
        picture,
        _capital(title.partition(": ")[2]),
        html.legend((svg.swatch(s.style, marks=s.marks), s.label) for s in series),
    )


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _scatter(group: Group, runs: Sequence[Lines]) -> str:
    series = []
    for i, (key, label) in enumerate(PREDICTIONS.items(), start=1):
        pairs = np.concatenate([_pairs(lines, key) for lines in runs])
        pairs = pairs[:: -(-len(pairs) // MAX_POINTS) or 1]
        if len(pairs):
            series.append(Series(label, pairs[:, 0], pairs[:, 1], i, line=False, marks=True, hollow=True))
    if not series:
        return ""
    picture = svg.chart(
        series, title=f"{group.label}: measured against predicted change of the entropy", xlabel="predicted, nats",
        ylabel="measured, nats", diagonal=True,
    )  # fmt: skip
    return html.figure(
        picture, "Measured against predicted, dotted: equal",
        html.legend((svg.swatch(s.style, line=False, hollow=True), s.label) for s in series),
    )  # fmt: skip


def _partitions(totals: Totals) -> list[str]:
    """Names of the partitions: the known ones first, then those by mechanism."""
    names = {partition for partition, _ in totals}
    return [name for name in TITLES if name in names] + sorted(names - TITLES.keys())


def _title(partition: str) -> str:
    return TITLES.get(partition) or f"By mechanism: {partition.removeprefix('mechanism.')}"


def _totals(runs: Sequence[Lines]) -> Totals:
    """Sum over rollouts of each part's contribution, mean over the runs that have it, in the order of the parts."""
    sums: dict[str, list[float]] = {}
    for lines in runs:
        own: dict[str, float] = {}
        for line in lines:
            for key, value in line.items():
                if key.startswith(PREFIX) and key.count("/") == 3 and _finite(value):
                    own[key] = own.get(key, 0.0) + float(value)
        for key, value in own.items():
            sums.setdefault(key, []).append(value)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key in sorted(sums, key=_place):
        _, partition, part, quantity = key.split("/")
        found.setdefault((partition, quantity), {})[part] = float(np.mean(sums[key]))
    return found


def _place(key: str) -> tuple[int, str]:
    _, partition, part, _ = key.split("/")
    known = list(PARTS.get(partition, {}))
    return known.index(part) if part in known else len(known), key


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _bars(
    totals: Totals, partition: str, quantities: Sequence[str], labels: Sequence[str], *, mean: bool = False
) -> str:
    """Bars of a partition: contributions, or with `mean` the mean over the tokens of each part."""
    sums = [totals.get((partition, quantity), {}) for quantity in quantities]
    shares = totals.get((partition, "fraction"), {})
    if not any(sums):
        return ""
    rows = []
    for part in shares or sums[0]:
        scale = 1.0 if not mean else shares.get(part) or np.nan
        name = PARTS.get(partition, {}).get(part, part)
        rows.append(Bar(name, [found.get(part, np.nan) / scale for found in sums]))
    title = "Covariance by difficulty, mean over tokens" if mean else _title(partition)
    xlabel = "covariance of log π and advantage, nats" if mean else "contribution to the change of the entropy, nats"
    styles = range(len(quantities))
    picture = svg.bars(rows, list(styles), title=title, xlabel=xlabel)
    entries = [(svg.block(style), label) for style, label in zip(styles, labels)]
    return html.figure(picture, title, html.legend(entries) if labels else "")


def _numbers(totals: Totals) -> str:
    """All partitions as a table, shown on demand."""
    rows = []
    for partition in _partitions(totals):
        shares, measured, lemma = (totals.get((partition, key), {}) for key in ("fraction", CHANGE, LEMMA))
        total = sum(shares.values())
        for part, share in shares.items():
            rows.append(
                {
                    "partition": _title(partition), "part": PARTS.get(partition, {}).get(part, part),
                    "share": f"{100 * share / total:.2f} %" if total else None,
                    "measured": measured.get(part), "lemma": lemma.get(part),
                }
            )  # fmt: skip
    columns = {
        "partition": "partition", "part": "part", "share": "share of the tokens", "measured": "measured, nats",
        "lemma": "Lemma 1, nats",
    }  # fmt: skip
    return html.details("The contributions as numbers", html.table(rows, columns)) if rows else ""

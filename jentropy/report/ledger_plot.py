"""The entropy ledger of a run as a picture, and how well its predictions agree with what was measured."""

from collections.abc import Mapping
from os import PathLike
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from jentropy.report.plots import (
    COLOURS,
    DASHES,
    GREY,
    FloatArray,
    Lines,
    _figure,
    _finish,
    _is_finite,
    _series,
    stage_boundaries,
)

MEASURED = "ledger/entropy_change"
PREDICTIONS = {"ledger/lemma1": "Lemma 1", "ledger/first_order": "first order in the parameters"}
DIFFICULTIES = ("0", "0.25", "0.5", "0.75", "1-", "1")
"""Parts of the partition by difficulty, in their order."""

LABELS = ("none", "to 1/4", "to 1/2", "to 3/4", "below 1", "all")


class Agreement(NamedTuple):
    """How a prediction of the change of the entropy agrees with the measured one over the steps of a run.

    Attributes:
      correlation: Pearson's; NaN with fewer than 3 steps, or if either does not vary.
      slope: of the least squares of measured on predicted, with an intercept; NaN in the same cases.
      num_steps: how many steps have both.
    """

    correlation: float
    slope: float
    num_steps: int


def agreement(lines: Lines, key: str, *, sign: float = 1.0) -> Agreement:
    """Agreement of `sign` times the prediction `key` with the measured change, over the lines that have both.

    Args:
      lines: of `ledger.jsonl`.
      key: such as `ledger/lemma1`.
      sign: -1 for a covariance, which lowers the entropy where it is positive.
    """
    x, y = _pairs(lines, key).T
    x = sign * x
    if x.size < 3 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return Agreement(np.nan, np.nan, x.size)
    dx, dy = x - x.mean(), y - y.mean()
    return Agreement(float(dx @ dy / np.sqrt((dx @ dx) * (dy @ dy))), float(dx @ dy / (dx @ dx)), x.size)


def _pairs(lines: Lines, key: str) -> FloatArray:
    """Predicted and measured change `[n, 2]` of the lines that have both."""
    pairs = [(line.get(key), line.get(MEASURED)) for line in lines]
    return np.array([pair for pair in pairs if all(map(_is_finite, pair))], np.float64).reshape(-1, 2)


def covariance_by_difficulty(lines: Lines) -> dict[str, float]:
    """Mean covariance of the tokens of each difficulty over all lines; difficulties without a token are left out.

    A token's covariance is its part of that of its rollout, (log π - mean)(A - mean).
    """
    found = {}
    for part in DIFFICULTIES:
        keys = [f"ledger/difficulty/{part}/{quantity}" for quantity in ("covariance", "fraction")]
        pairs = [[line[key] for key in keys] for line in lines if all(_is_finite(line.get(key)) for key in keys)]
        covariance, fraction = np.array(pairs, np.float64).reshape(-1, 2).sum(axis=0)
        if fraction > 0.0:
            found[part] = float(covariance / fraction)
    return found


def ledger_plot(lines: Lines, path: str | PathLike[str], title: str) -> None:
    """Draws one run's ledger: change of the entropy by step, predicted against measured, covariance by difficulty.

    Args:
      lines: of `ledger.jsonl`, in any order.
      path: of the picture; its suffix gives the format.
      title: of the picture.
    """
    figure = _figure(12.5, 7.0)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.3, 1.0))
    change, total = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    scatter, difficulty = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    keys = {MEASURED: "measured", **PREDICTIONS}
    for index, (key, label) in enumerate(keys.items()):
        steps, values = _series(lines, key)
        dense = key != "ledger/first_order"
        colour, dash = COLOURS[index], DASHES[index] if dense else ""
        if steps.size:
            marker = "" if dense and steps.size > 1 else "o"
            change.plot(steps, values, color=colour, linestyle=dash, marker=marker, markersize=4, label=label)
        if steps.size and dense:
            total.plot(steps, np.cumsum(values), color=colour, linestyle=dash, label=label)
    for axes in (change, total):
        for boundary in stage_boundaries(lines):
            axes.axvline(boundary, color=GREY, linestyle=":", linewidth=1.3, zorder=0)
    _finish(change, "Change of the entropy in a step", "step", "nats", tuple(keys))
    _finish(total, "Its sum over the steps of the ledger", "step", "nats", tuple(keys))
    for axes in (change, total):
        if axes.has_data():
            low, high = min(0.0, axes.dataLim.ymin), max(0.0, axes.dataLim.ymax)
            around = 0.05 * (high - low) or 1e-3
            axes.set_ylim(low - around, high + around)
    _draw_scatter(scatter, lines)
    _draw_difficulty(difficulty, covariance_by_difficulty(lines))
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.savefig(path)


def _draw_scatter(axes: Axes, lines: Lines) -> None:
    """Measured against predicted change, one point per step, and the line on which they are equal."""
    for index, (key, name) in enumerate(PREDICTIONS.items(), start=1):
        pairs = _pairs(lines, key)
        if pairs.size:
            found = agreement(lines, key)
            label = f"{name}: no correlation, steps: {found.num_steps}"
            if np.isfinite(found.correlation):
                label = f"{name}: correlation {found.correlation:.3f}, slope {found.slope:.2f}"
            marker = "o" if index == 1 else "^"
            axes.plot(*pairs.T, color=COLOURS[index], linestyle="", marker=marker, alpha=0.6, label=label)
    _finish(axes, "Measured against predicted", "predicted change of the entropy, nats", "measured, nats", (MEASURED,))
    if axes.has_data():
        axes.legend(loc="upper left", fontsize=9, framealpha=0.85, edgecolor="none")
        axes.axline((0.0, 0.0), slope=1.0, color=GREY, linestyle=":", linewidth=1.3, zorder=0)


def _draw_difficulty(axes: Axes, covariance: Mapping[str, float]) -> None:
    """Bars of the mean covariance by difficulty."""
    places = [DIFFICULTIES.index(part) for part in covariance]
    if places:
        axes.bar(places, list(covariance.values()), color=COLOURS[0])
        axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.set_title("Covariance of log π and advantage, by difficulty", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if not places:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data: ledger/difficulty", transform=axes.transAxes, ha="center", color=GREY)
        return
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set_xlabel("share of right responses to the prompt")
    axes.set_ylabel("mean over tokens")

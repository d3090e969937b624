"""Pictures of runs, drawn without a display from the lines of `metrics.jsonl`.

Each line is a mapping with `step` (counted over all stages) and `stage`; other keys may be missing from any line, and
evaluation keys (`val/...`) stand only on evaluation steps. Of keys that end in a number of samples, `@n`, the largest
n that a run has is drawn, with the 95 % interval over prompts where the run recorded it. Colours are Okabe and Ito's,
distinct under the common forms of colour blindness and told apart by line style as well.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any, TypeGuard

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from jentropy.theory.law import LawError, fit_run

Lines = Sequence[Mapping[str, Any]]
FloatArray = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1)), ":")
GREY = "#555555"

ENTROPY = "actor/entropy"
HELD_OUT_ENTROPY = "val/entropy"
REWARD = "val/reward/mean@"
HELD_OUT = {REWARD: "reward, mean@", "val/pass@": "pass@", "val/reward_hard/mean@": "hard prompts, mean@"}
CONTROL = {"cov/mean": "Covariance of log π and advantage", "actor/pg_clipfrac": "Fraction of tokens clipped"}
SMOOTHING = 7


def run_plot(metrics: Lines, path: str | PathLike[str], title: str) -> None:
    """Draws one run: entropy, held-out reward and pass@8, the law, and covariance or clip fraction.

    Dotted lines mark the beginnings of stages. A panel without data says which keys it looked for, and a law that
    cannot be fitted says why.

    Args:
      metrics: lines of the run, in any order.
      path: of the picture; its suffix gives the format.
      title: of the picture.
    """
    figure = _figure(10.0, 7.2)
    (entropy, reward), (law, control) = figure.subplots(2, 2)
    _draw_smoothed(entropy, metrics, ENTROPY, 0)
    _finish(entropy, f"Policy entropy, mean of {SMOOTHING} steps", "step", "nats", (ENTROPY,))
    for index, (prefix, label) in enumerate(HELD_OUT.items()):
        _draw_evaluations(reward, metrics, prefix, index, label)
    _finish(reward, "Held-out prompts", "step", "", [f"{prefix}n" for prefix in HELD_OUT], at_least=1.0)
    _draw_law(law, metrics)
    key = next((key for key in CONTROL if _series(metrics, key)[0].size), "actor/pg_clipfrac")
    _draw_smoothed(control, metrics, key, 0)
    _finish(control, f"{CONTROL[key]}, mean of {SMOOTHING} steps", "step", "", tuple(CONTROL))
    for axes in (entropy, reward, control):
        for boundary in stage_boundaries(metrics):
            axes.axvline(boundary, color=GREY, linestyle=":", linewidth=1.3, zorder=0)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.savefig(path)


def comparison_plot(
    runs: Mapping[str, Lines], path: str | PathLike[str], shift_step: float | None, *, law_run: Lines | None = None
) -> None:
    """Draws several methods through a shift of the task: whose entropy collapses, and who can still adapt.

    Args:
      runs: lines of each run by the method's name; drawn in this order.
      path: of the picture; its suffix gives the format.
      shift_step: the first step on the new task; `None` marks nothing.
      law_run: lines of a run without entropy control, drawn beside them with the fit of the law; without it the
        picture has two panels.
    """
    figure = _figure(12.0 if law_run is not None else 7.5, 6.8)
    left = figure
    if law_run is not None:
        grid = figure.add_gridspec(1, 2, width_ratios=(1.5, 1.0))
        left, right = figure.add_subfigure(grid[0, 0]), figure.add_subfigure(grid[0, 1])
        _draw_law(right.subplots(), law_run, "Reward against entropy, without a shift")
    entropy, reward = left.subplots(2, 1, sharex=True)
    for index, (name, lines) in enumerate(runs.items()):
        _draw_smoothed(entropy, lines, ENTROPY, index, name)
        _draw_evaluations(reward, lines, REWARD, index)
    _finish(entropy, f"Policy entropy, mean of {SMOOTHING} steps", "", "nats", (ENTROPY,), legend=False)
    _finish(
        reward, "Held-out reward", "step", f"mean@{_largest(REWARD, *runs.values())}", (REWARD + "n",), at_least=1.0
    )
    handles, labels = entropy.get_legend_handles_labels()
    if handles:
        left.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=10, frameon=False, handlelength=3)
    if shift_step is not None:
        for axes in (entropy, reward):
            axes.axvline(shift_step, color=GREY, linestyle=":", linewidth=1.5, zorder=0)
            above = axes.get_xaxis_transform()
            axes.text(shift_step, 1.01, "the task shifts", transform=above, ha="center", va="bottom", color=GREY)
    figure.savefig(path)


def stage_boundaries(metrics: Lines) -> list[float]:
    """The first step of every stage but the first, from lines in any order."""
    lines = [line for line in _ordered(metrics) if "stage" in line]
    return [float(after["step"]) for before, after in pairwise(lines) if before["stage"] != after["stage"]]


def law_points(metrics: Lines) -> dict[Any, tuple[FloatArray, FloatArray]]:
    """Entropy in nats `[n]` and held-out reward `[n]` of every evaluation, by stage, in the order of the steps.

    The entropy is `val/entropy` where the evaluation measured it, and else the step's `actor/entropy`. The law is a
    statement about one stage: a shift of the task changes its coefficients.
    """
    return {stage: (entropy, reward) for stage, (_, entropy, reward) in law_curves(metrics).items()}


def law_curves(metrics: Lines) -> dict[Any, tuple[FloatArray, FloatArray, FloatArray]]:
    """As `law_points`, with the step `[n]` of every evaluation before its entropy and reward."""
    stages: dict[Any, list[tuple[float, float, float]]] = {}
    key = f"{REWARD}{_largest(REWARD, metrics)}"
    for line in _ordered(metrics):
        entropy, reward = line.get(HELD_OUT_ENTROPY, line.get(ENTROPY)), line.get(key)
        if _is_finite(entropy) and _is_finite(reward):
            stages.setdefault(line.get("stage"), []).append((line["step"], entropy, reward))
    arrays = {stage: np.array(points, np.float64) for stage, points in stages.items()}
    return {stage: (points[:, 0], points[:, 1], points[:, 2]) for stage, points in arrays.items()}


def smooth(values: FloatArray, width: int = SMOOTHING) -> FloatArray:
    """Centred moving mean of `values` `[n]`, over an odd `width`; at the ends, over the values that exist."""
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width must be odd and positive, got {width!r}")
    kernel, half = np.ones(width), width // 2
    total = np.convolve(values, kernel)[half : half + values.size]
    return total / np.convolve(np.ones_like(values), kernel)[half : half + values.size]


def _draw_law(axes: Axes, metrics: Lines, title: str = "Reward against entropy") -> None:
    """Reward against entropy at the evaluations, and each stage's fit or the reason why it has none."""
    stages = law_points(metrics)
    for index, (stage, (entropy, reward)) in enumerate(stages.items()):
        colour, name = COLOURS[index % len(COLOURS)], f"{stage}: " if len(stages) > 1 else ""
        axes.plot(
            entropy, reward, color=colour, linestyle="", marker="o", markersize=5.5, alpha=0.45, markeredgewidth=0
        )
        try:
            law = fit_run(entropy, reward)
        except LawError as error:
            where = f"{stage}:\n" if name else ""
            axes.plot([], [], color=colour, linestyle="", marker="o", label=f"{where}no fit: {error}")
            continue
        curve = np.linspace(0.0, 1.03 * entropy.max(), 200)
        sign = "+" if law.b >= 0 else "-"
        fit = f"{name}R = {-law.a:.2f} exp(H) {sign} {abs(law.b):.2f}"
        quality = f"ceiling {law.ceiling:.3f} ± {law.ceiling_stderr:.3f}, R² {law.r_squared:.3f}"
        dash = DASHES[index % len(DASHES)]
        axes.plot(curve, law.predict(curve), color=colour, linestyle=dash, linewidth=1.9, label=f"{fit}\n{quality}")
    _finish(axes, title, "policy entropy, nats", f"held-out reward, mean@{_largest(REWARD, metrics)}", (REWARD + "n",))
    if stages:
        axes.set_xlim(left=0.0)


def _draw_smoothed(axes: Axes, metrics: Lines, key: str, index: int, label: str | None = None) -> None:
    """A series: faint as measured, strong as a moving mean, which does not reach over the boundary of a stage."""
    steps, values = _series(metrics, key)
    cuts = np.searchsorted(steps, stage_boundaries(metrics))
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    for part_steps, part in zip(np.split(steps, cuts), np.split(values, cuts)):
        if part.size:
            marker = "o" if part.size == 1 else ""
            axes.plot(part_steps, part, color=colour, alpha=0.25, linewidth=0.9)
            axes.plot(part_steps, smooth(part), color=colour, linestyle=dash, marker=marker, linewidth=1.9, label=label)
            label = None


def _draw_evaluations(axes: Axes, metrics: Lines, prefix: str, index: int, label: str | None = None) -> None:
    """The evaluations `prefix + n`, and a band for their intervals."""
    num_samples = _largest(prefix, metrics)
    key = f"{prefix}{num_samples}"
    steps, values = _series(metrics, key)
    (_, low), (_, high) = _series(metrics, f"{key}/low"), _series(metrics, f"{key}/high")
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    name = None if label is None else f"{label}{num_samples}"
    if steps.size:
        axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.5, marker="o", markersize=3.5, label=name)
    if steps.size and steps.size == low.size == high.size:
        axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)


def _finish(
    axes: Axes, title: str, xlabel: str, ylabel: str, keys: Sequence[str], *, at_least: float = 0.0, legend: bool = True
) -> None:
    """Titles, limits, grid and legend; a panel without data says which keys it looked for.

    The vertical axis holds 0 to `at_least`, except on the panel of the law, where `xlabel` is not the step.
    """
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.has_data():
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data: " + " or ".join(keys), transform=axes.transAxes, ha="center", color=GREY)
        return
    axes.grid(alpha=0.25, linewidth=0.6)
    if "entropy" not in xlabel:
        low, high = axes.dataLim.intervaly
        margin = 0.04 * max(high, at_least, 1e-3)
        axes.set_ylim(min(0.0, low) - margin / 2, max(high, at_least) + margin)
        first, last = axes.dataLim.intervalx
        around = 0.03 * (last - first) or 1.0
        axes.set_xlim(first - around, last + around)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=9, framealpha=0.85, edgecolor="none")


def _series(metrics: Lines, key: str) -> tuple[FloatArray, FloatArray]:
    """Steps and values of the lines where the key is a finite number, in the order of the steps."""
    points = [(line["step"], line[key]) for line in _ordered(metrics) if _is_finite(line.get(key))]
    array = np.array(points, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _largest(prefix: str, *runs: Lines) -> int:
    """The largest n among the keys `prefix + n` of the runs; 8 if there is none."""
    ends = [key.removeprefix(prefix) for lines in runs for line in lines for key in line if key.startswith(prefix)]
    return max((int(end) for end in ends if end.isdigit()), default=8)


def _ordered(metrics: Lines) -> list[Mapping[str, Any]]:
    return sorted((line for line in metrics if _is_finite(line.get("step"))), key=lambda line: line["step"])


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure

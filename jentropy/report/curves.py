"""Runs as groups and curves: those that differ only in their seeds are one curve with a band.

The seeds are the run's, `seed`, and those of its stages (of the warm start), `stages.0.seed`; the name does not count
either. A band is the 95 % bootstrap interval of the mean over three runs or more, and reaches from the smaller to the
larger of two.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jentropy.config import read_lines
from jentropy.report.comparison import interval
from jentropy.report.html import number
from jentropy.report.plots import smooth, stage_boundaries
from jentropy.report.svg import FloatArray, Series
from jentropy.train.metrics import read_metrics

Lines = Sequence[Mapping[str, Any]]

MAX_POINTS = 200
MAX_MARKS = 40
MAX_LEGEND = 12
"""Methods that are named below every picture; of more, the look is in the table of methods."""
_DRAWS = 2000
_OWN = re.compile(r"name|seed|stages\.\d+\.seed")


class Run(NamedTuple):
    """One run's folder, as far as it was written.

    Attributes:
      path: of the folder.
      folder: the end of the path, long enough to be told from those of the other runs.
      metrics: lines of `metrics.jsonl`.
      ledger: lines of `ledger.jsonl`; None without that file.
      config: field -> value, as in `config.txt`; empty without that file.
      notes: what is wrong with it, in sentences.
    """

    path: Path
    folder: str
    metrics: Lines
    ledger: Lines | None
    config: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The config's name, else the folder's."""
        return self.config.get("name", repr(self.folder)).strip("'\"")

    @property
    def finished(self) -> bool:
        """Whether the evaluation at the end of the run is there."""
        return any(line.get("final") for line in self.metrics)

    @property
    def rollouts(self) -> int:
        """Rollouts done, as far as they were recorded."""
        return int(max((line["step"] + (not line.get("final")) for line in self.metrics if _trained(line)), default=0))

    @property
    def planned(self) -> int | None:
        """Rollouts that the config asks for; None without a config."""
        stages = [key for key in self.config if re.fullmatch(r"stages\.\d+", key)]
        steps = [self.config.get(f"{stage}.steps", "") for stage in stages if "Supervised" not in self.config[stage]]
        return sum(map(int, steps)) if steps and all(s.isdecimal() for s in steps) else None


class Group(NamedTuple):
    """Runs that differ in seeds and name only.

    Attributes:
      label: what the group is called.
      runs: at least one.
      style: number of its colour, dashes and marker.
    """

    label: str
    runs: tuple[Run, ...]
    style: int


def _trained(line: Mapping[str, Any]) -> bool:
    return "actor/entropy" in line or "actor/loss" in line or bool(line.get("final"))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads runs; a folder that is given twice counts once.

    Raises:
      ValueError: a folder is no run, or has a damaged line before its last; names it.
    """
    paths = list({path.resolve(): path for path in paths})
    for path in paths:
        if not any((path / name).is_file() for name in ("metrics.jsonl", "config.txt")):
            raise ValueError(f"{path} is no run: it has neither metrics.jsonl nor config.txt")
    return [_read_run(path, folder) for path, folder in zip(paths, _short_names(paths))]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell it from the others."""
    names = []
    for path in paths:
        depths = range(1, len(path.parts) + 1)
        endings = (path.parts[-depth:] for depth in depths)
        unique = (end for end in endings if sum(other.parts[-len(end) :] == end for other in paths) == 1)
        names.append("/".join(next(unique, path.parts)))
    return names


def _read_run(path: Path, folder: str) -> Run:
    notes = [f"{name}: the last line was torn and is left out" for name in _FILES if _is_torn(path / name)]
    metrics = read_metrics(path / "metrics.jsonl")
    ledger = read_metrics(path / "ledger.jsonl") if (path / "ledger.jsonl").is_file() else None
    config: dict[str, str] = {}
    if (path / "config.txt").is_file():
        fields = [line.partition(" = ") for line in read_lines(path / "config.txt")]
        config = {name: value for name, _, value in fields}
    else:
        notes.append("no config.txt: it stands alone, without seed and config")
    lines = [line for line in metrics if isinstance(line.get("step"), (int, float))]
    if len(lines) < len(metrics):
        notes.append(f"{len(metrics) - len(lines)} lines without a step are left out")
    run = Run(path, folder, lines, ledger, config, ())
    if not run.finished:
        planned = f" of {run.planned}" if run.planned else ""
        notes.append(f"not finished: {run.rollouts}{planned} rollouts")
    if not any(key.startswith("val/") for line in lines for key in line):
        notes.append("no evaluation")
    return run._replace(notes=tuple(notes))


_FILES = ("metrics.jsonl", "ledger.jsonl")


def _is_torn(path: Path) -> bool:
    content = path.read_bytes() if path.is_file() else b""
    if not content or content.endswith(b"\n"):
        return False
    try:
        return not isinstance(json.loads(content.splitlines()[-1]), dict)
    except ValueError:
        return True


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The runs by their configs without seeds and name, in the order of their first run."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        shared = frozenset((key, value) for key, value in run.config.items() if not _OWN.fullmatch(key))
        groups.setdefault(shared or run.path, []).append(run)
    labels, seen = [], {}
    for members in groups.values():
        label = _common([run.name for run in members])
        seen[label] = seen.get(label, 0) + 1
        labels.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return [Group(label, tuple(members), i) for i, (label, members) in enumerate(zip(labels, groups.values()))]


def _common(names: Sequence[str]) -> str:
    """What all names begin with, cut between words: `a-w0-s1` and `a-w0-s2` give `a-w0`."""
    split = [re.split(r"([-_.])", name) for name in names]
    shared = []
    for parts in zip(*split):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(shared).rstrip("-_.") or names[0]


def differing(groups: Sequence[Group]) -> list[dict[str, str | None]]:
    """The fields in which the groups differ, seeds and names left out: `field`, then the value by group's number."""
    configs = [group.runs[0].config for group in groups]
    keys = dict.fromkeys(key for config in configs for key in config if not _OWN.fullmatch(key))
    rows = [{"field": key} | {str(i): config.get(key) for i, config in enumerate(configs)} for key in keys]
    return [row for row in rows if len({row[str(i)] for i in range(len(configs))}) > 1]


def points(lines: Lines, key: str) -> tuple[FloatArray, FloatArray]:
    """Steps and values where the key is a finite number, by step."""
    found = {line["step"]: line[key] for line in lines if _is_finite(line.get(key)) and _is_finite(line.get("step"))}
    array = np.array(sorted(found.items()), np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def band(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean, lower and upper end of the band of `values` `[runs, n]`, NaN where a run has none; each `[n]`.

    Where three runs or more have a value, the ends bound the 95 % bootstrap interval of their mean; where two have,
    they are these two; where one has, there is no band (NaN).
    """
    there = np.isfinite(values)
    mean, low, high = (np.full(values.shape[1], np.nan) for _ in range(3))
    patterns, inverse = np.unique(there, axis=1, return_inverse=True)
    for i, pattern in enumerate(patterns.T):
        columns, count = np.flatnonzero(inverse.reshape(-1) == i), int(pattern.sum())
        chosen = values[pattern][:, columns]
        if count:
            mean[columns] = chosen.mean(axis=0)
        if count == 2:
            low[columns], high[columns] = chosen.min(axis=0), chosen.max(axis=0)
        elif count > 2:
            draws = np.random.default_rng(0).integers(0, count, (_DRAWS, count))
            weights = np.stack([(draws == k).mean(axis=1) for k in range(count)], axis=1)
            low[columns], high[columns] = np.quantile(weights @ chosen, [0.025, 0.975], axis=0)
    return mean, low, high


def spread(values: Sequence[float]) -> str | None:
    """The mean of some runs: [95 % bootstrap interval] of three or more, (smaller to larger) of two; None of none."""
    if not values:
        return None
    mean = number(float(np.mean(values)))
    if len(values) == 1:
        return mean
    if len(values) == 2:
        return f"{mean} ({number(min(values))} to {number(max(values))})"
    _, low, high = interval(values)
    return f"{mean} [{number(low)}, {number(high)}]"


def curve(
    label: str, style: int, runs: Sequence[Lines], key: str, *, smoothed: bool = False, marks: bool = False,
    banded: bool = True,
) -> Series | None:  # fmt: skip
    """One curve of several runs; None if none of them has the key.

    Args:
      label: of the curve.
      style: number of its colour, dashes and marker.
      runs: lines of each.
      key: what is drawn against `step`.
      smoothed: whether the values of each run are moving means, of `plots.SMOOTHING` lines, within a stage: at its end
        the curve is broken.
      marks: whether points are marked, if there are few.
      banded: whether a band is drawn.
    """
    found = [points(lines, key) for lines in runs]
    steps = np.unique(np.concatenate([x for x, _ in found])) if found else np.zeros(0)
    if not steps.size:
        return None
    cuts = np.array(sorted({b for lines in runs for b in stage_boundaries(lines)}) if smoothed else [])
    values = np.full((len(found), steps.size), np.nan)
    for row, (x, y) in zip(values, found):
        parts = np.split(y, np.searchsorted(x, cuts)) if smoothed else [y]
        row[np.searchsorted(steps, x)] = np.concatenate([smooth(p) if smoothed and p.size else p for p in parts])
    x, values = _thinned(steps, values, cuts)
    mean, low, high = band(values)
    some = banded and bool(np.isfinite(low).any())
    few = int(np.isfinite(mean).sum()) <= MAX_MARKS
    return Series(label, x, mean, style, low if some else None, high if some else None, marks=marks and few)


def _thinned(steps: FloatArray, values: FloatArray, cuts: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most some `MAX_POINTS` means of neighbouring steps, with NaN between the stages."""
    width = -(-steps.size // MAX_POINTS)
    xs, ys = [], []
    for part in np.split(np.arange(steps.size), np.searchsorted(steps, cuts)):
        for start in range(0, part.size, width):
            columns = part[start : start + width]
            chosen = values[:, columns]
            count = np.isfinite(chosen).sum(axis=1)
            xs.append(steps[columns].mean())
            ys.append(np.where(count > 0, np.nansum(chosen, axis=1) / np.maximum(count, 1), np.nan))
        if part.size:
            xs.append(steps[part[-1]])
            ys.append(np.full(len(values), np.nan))
    return np.array(xs[:-1]), np.stack(ys[:-1], axis=1)

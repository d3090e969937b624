"""One page about several runs: figures, curves, the law, the ledger, configs and the tokens themselves.

The page is one file that loads nothing and runs nothing; equal runs give equal bytes, for it holds no dates and no
wall times.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jentropy.base import require
from jentropy.report import html, svg
from jentropy.report.atlas import atlas
from jentropy.report.curves import MAX_LEGEND, Group, Run, curve, differing, group_runs, points, read_runs, spread
from jentropy.report.html import Html
from jentropy.report.law import law_section
from jentropy.report.ledger import ledger_section
from jentropy.report.plots import SMOOTHING, stage_boundaries

LAST = 10
"""Rollouts over which the entropy at the end of training is averaged."""
MAX_LISTED = 10
"""Runs that are listed at the head of the page; more are listed on demand."""
MAX_OWN = 12
"""Metrics of mechanisms that are drawn."""

_COMMON = re.compile(
    r"(actor/(entropy|grad_norm|.*loss|pg_clipfrac.*|ppo_kl)$|val|critic|clip_ratio|response_length|sampler|update|cov"
    r"|entropy|ledger|law|data|error)(/|$)|(step|stage|final|reward_std|frac_reward_zero_std)$"
)


def report(paths: Sequence[str | os.PathLike], out: str | os.PathLike, *, num_responses: int = 16) -> None:
    """Writes the page about the runs in the folders `paths` to the file `out`, whole or not at all.

    Args:
      paths: folders of runs, finished or not; at least one. They are grouped by their configs.
      out: a file whose name ends in .html; replaced if it is there.
      num_responses: responses in the token atlas, in all; 0 for none.

    Raises:
      ValueError: a folder is no run or has a damaged file, or an argument is out of range; names it.
      OSError: a file cannot be read or written.
    """
    out = Path(out)
    require(len(paths) > 0, "paths", list(paths), "at least one run")
    require(out.suffix.lower() in (".html", ".htm"), "out", str(out), "a file that ends in .html")
    require(num_responses >= 0, "num_responses", num_responses, "at least 0")
    content = render(read_runs([Path(path) for path in paths]), num_responses)
    temporary = out.with_name(f"{out.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(out)


def render(runs: Sequence[Run], num_responses: int = 16) -> str:
    """The page about runs that were read."""
    groups = group_runs(runs)
    sections = {
        "methods": ("Methods", methods_section(groups)),
        "curves": ("Curves", curves_section(groups)),
        "law": ("The law: reward against entropy", law_section(groups)),
        "ledger": ("Entropy ledger", ledger_section(groups)),
        "atlas": ("Token atlas", atlas(groups, num_responses)),
        "configs": ("Configs", configs_section(groups)),
    }
    links = "".join(f'<li><a href="#{name}">{html.text(head)}</a></li>' for name, (head, _) in sections.items())
    title = groups[0].label if len(groups) == 1 else f"{len(groups)} methods, {len(runs)} runs"
    body = [
        f"<h1>{html.text(title)}</h1>",
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
        _runs_table(groups),
        *(html.section(name, heading, content) for name, (heading, content) in sections.items()),
    ]
    return html.page(f"jentropy report: {title}", "\n".join(body))


def _runs_table(groups: Sequence[Group]) -> str:
    """What the runs are."""
    rows = []
    for group in groups:
        for run in group.runs:
            warm = [value for key, value in run.config.items() if re.fullmatch(r"stages\.\d+\.seed", key)]
            planned = "" if run.planned is None else f" of {run.planned}"
            rows.append(
                {
                    "method": _named(group), "run": run.folder, "seed": run.config.get("seed"),
                    "warm": ", ".join(warm) or None, "rollouts": f"{run.rollouts}{planned}",
                    "state": "finished" if run.finished else "not finished",
                }
            )  # fmt: skip
    columns = {
        "run": "run", "method": "method", "seed": "seed", "warm": "seed of the warm start", "rollouts": "rollouts",
        "state": "state",
    }  # fmt: skip
    remarks = [f"{run.folder}: {note}." for group in groups for run in group.runs for note in run.notes]
    table = html.table(rows, columns)
    if len(rows) > MAX_LISTED:
        table = html.details(f"The {len(rows)} runs", table)
    return table + html.notes(remarks)


def _named(group: Group) -> Html:
    return Html(svg.swatch(group.style) + html.text(group.label))


def key_of_largest(prefix: str, groups: Sequence[Group]) -> str | None:
    """`prefix + n` with the largest n that all runs with any such key have; else the largest there is; or None."""
    pattern = re.compile(re.escape(prefix) + r"\d+")
    runs = [{k for line in run.metrics for k in line if pattern.fullmatch(k)} for group in groups for run in group.runs]
    runs = [keys for keys in runs if keys]
    if not runs:
        return None
    keys = set.intersection(*runs) or set.union(*runs)
    return max(keys, key=lambda key: int(key.removeprefix(prefix)))


def methods_section(groups: Sequence[Group]) -> str:
    """The table of final figures."""
    reward, passed = key_of_largest("val/reward/mean@", groups), key_of_largest("val/pass@", groups)
    hard = key_of_largest("val/reward_hard/mean@", groups)
    figures: dict[str, tuple[str, Callable[[Run], float | None]]] = {
        "reward": (f"reward, {_after(reward)}", lambda run: _last(run, reward)),
        "passed": (_after(passed), lambda run: _last(run, passed)),
        "greedy": ("greedy reward", lambda run: _last(run, "val/reward/greedy")),
        "hard": (f"hard prompts, {_after(hard)}", lambda run: _last(run, hard)),
        "entropy": ("held-out entropy", lambda run: _last(run, "val/entropy")),
        "training": (f"entropy of the last {LAST} rollouts", _training_entropy),
    }
    rows = []
    for group in groups:
        done = [run for run in group.runs if run.finished] or list(group.runs)
        number = str(len(group.runs)) if len(done) == len(group.runs) else f"{len(done)} of {len(group.runs)}"
        sign = "" if done[0].finished else " †"
        row: dict[str, object] = {"method": _named(group), "runs": number + sign}
        for key, (_, figure) in figures.items():
            row[key] = spread([value for value in map(figure, done) if value is not None])
        rows.append(row)
    kept = {key: head for key, (head, _) in figures.items() if any(row[key] for row in rows)}
    sentences = [
        "Figures of the evaluation at the end of a run, means over runs; entropies in nats. In square brackets the "
        "95 % bootstrap interval of the mean over seeds (three runs or more); in round ones the smaller and the larger "
        "of two."
    ]
    if any("†" in str(row["runs"]) for row in rows):
        sentences.append("† No run of this method has finished: figures of the newest evaluation of each.")
    if any(" of " in str(row["runs"]) for row in rows):
        sentences.append("“n of m” runs: the figures are those of the n that have finished.")
    return html.table(rows, {"method": "method", "runs": "runs", **kept}) + html.notes(sentences)


def _after(key: str | None) -> str:
    return "" if key is None else key.rpartition("/")[2]


def _last(run: Run, key: str | None) -> float | None:
    values = points(run.metrics, key)[1] if key else []
    return float(values[-1]) if len(values) else None


def _training_entropy(run: Run) -> float | None:
    values = points(run.metrics, "actor/entropy")[1]
    return float(values[-LAST:].mean()) if values.size else None


def curves_section(groups: Sequence[Group]) -> str:
    """The curves against rollouts, then the metrics that mechanisms report."""
    zero, one = (0.0, 0.0), (0.0, 1.0)
    reward = key_of_largest("val/reward/mean@", groups) or "val/reward/mean@n"
    passed, hard = key_of_largest("val/pass@", groups), key_of_largest("val/reward_hard/mean@", groups)
    pictures = [
        _curves(groups, "actor/entropy", "Policy entropy of the rollouts", "nats", zero),
        _curves(groups, reward, f"Held-out reward, {_after(reward)}", "", one, evaluated=True),
        _curves(groups, passed or "val/pass@n", f"Held-out {_after(passed) or 'pass@n'}", "", one, evaluated=True),
        _curves(groups, "actor/pg_clipfrac", "Fraction of tokens clipped", "", zero),
        _curves(groups, "response_length/mean", "Response length, mean", "tokens", zero),
    ]
    optional = [
        (hard, f"Held-out reward of hard prompts, {_after(hard)}", "", one, True),
        ("clip_ratio/low_mean", "Fraction of tokens clipped from below", "", zero, False),
        ("clip_ratio/high_mean", "Fraction of tokens clipped from above", "", zero, False),
        ("cov/mean", "Covariance of log π and advantage", "nats", zero, False),
        ("critic/score/mean", "Reward of the rollouts", "", zero, False),
    ]
    for key, title, unit, least, evaluated in optional:
        if key and _has(groups, key):
            pictures.append(_curves(groups, key, title, unit, least, evaluated=evaluated))
    several = any(len(group.runs) > 1 for group in groups)
    bands = (
        " Bands: the 95 % bootstrap interval of the mean over seeds where three runs or more are there, from the "
        "smaller to the larger where two are."
        if several else ""
    )  # fmt: skip
    sentence = (
        f"Against rollouts since the start of the run. What is measured on rollouts is a moving mean of {SMOOTHING}; "
        f"evaluations are marked. Dotted lines: a new stage.{bands}"
    )
    if len(groups) > MAX_LEGEND:
        sentence += " Which curve is which: see the table of methods; pointing at a curve names it."
    return html.paragraph(sentence, "soft") + f'<div class="grid">{"".join(pictures)}</div>' + _own(groups)


def _has(groups: Sequence[Group], key: str) -> bool:
    return any(key in line for group in groups for run in group.runs for line in run.metrics)


def _curves(
    groups: Sequence[Group], key: str, title: str, unit: str, at_least: tuple[float, float], *, evaluated: bool = False
) -> str:
    """One picture of one key."""
    drawn = [
        curve(g.label, g.style, [run.metrics for run in g.runs], key, smoothed=not evaluated, marks=evaluated)
        for g in groups
    ]
    series = [one for one in drawn if one is not None]
    boundaries = {b for group in groups for run in group.runs for b in stage_boundaries(run.metrics)}
    picture = svg.chart(
        series, title=f"{title}: {', '.join(one.label for one in series)}", xlabel="rollouts", ylabel=unit,
        at_least=at_least, verticals=sorted(boundaries), integer=True,
    )  # fmt: skip
    entries = [(svg.swatch(one.style, marks=one.marks), one.label) for one in series]
    return html.figure(picture, title, html.legend(entries) if 1 < len(groups) <= MAX_LEGEND else "")


def _own(groups: Sequence[Group]) -> str:
    """The metrics of mechanisms, estimators and samplers that not every run has."""
    keys = {k for g in groups for run in g.runs for line in run.metrics for k, v in line.items() if _is_number(v)}
    keys = sorted(key for key in keys if not _COMMON.match(key))
    if not keys:
        return ""
    pictures = [_curves(groups, key, key, "", (0.0, 0.0)) for key in keys[:MAX_OWN]]
    left = html.notes([f"Not drawn: {', '.join(keys[MAX_OWN:])}."] if keys[MAX_OWN:] else [])
    return html.details("What mechanisms report", f'<div class="grid">{"".join(pictures)}</div>{left}')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def configs_section(groups: Sequence[Group]) -> str:
    """The fields in which the groups differ, then the config of every run."""
    parts = []
    if len(groups) > 1:
        rows = differing(groups)
        columns = {"field": "field", **{str(group.style): group.label for group in groups}}
        parts.append(html.paragraph("The fields in which the methods differ, seeds and names left out.", "soft"))
        parts.append(html.table(rows, columns, wide=True))
    for group in groups:
        first = group.runs[0]
        if not first.config:
            parts.append(html.paragraph(f"{first.folder}: no config.txt."))
            continue
        parts.append(html.details(f"{group.label}: config of {first.folder}", _listing(first.config)))
        others = [
            {"run": run.folder, "fields": "; ".join(f"{k} = {v}" for k, v in _changes(first.config, run.config))}
            for run in group.runs[1:]
        ]
        if others:
            heading = f"{group.label}: what differs in its other runs"
            parts.append(html.details(heading, html.table(others, {"run": "run", "fields": "fields"}, wide=True)))
    return "".join(parts)


def _listing(config: Mapping[str, str]) -> str:
    lines = "\n".join(html.text(f"{key} = {value}") for key, value in config.items())
    return f'<pre tabindex="0">{lines}</pre>'


def _changes(first: Mapping[str, str], other: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key, value) for key, value in other.items() if first.get(key) != value]

"""`jentropy doctor RUN`: is what a run has left whole, do its bad batches fail again, and where do two runs part?

Reads only: it may look at a run that is still going on, where a torn last line is nothing but a line being written.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl

from jentropy import config as config_lib
from jentropy.train import manifest
from jentropy.train.kept import FOLDER, KeptError, kept_steps, load_rollouts
from jentropy.train.quarantine import SKIPPED, QuarantineError, load_batch, stored_steps
from jentropy.train.replay import Replay, checkpoint_metadata, replay

_FINAL = "final"


class Findings(NamedTuple):
    """What is wrong, and what is worth knowing: a sentence each."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Report(NamedTuple):
    """What `doctor` found.

    Attributes:
      run: the folder.
      problems: what is damaged or contradicts itself; none in a healthy run.
      notes: what is worth knowing.
      replay: of a quarantined batch, if asked for.
      difference: where the run parts from the other one, if asked for; empty if nowhere.
    """

    run: Path
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    replay: Replay | None = None
    difference: str | None = None

    @property
    def exit_code(self) -> int:
        """65 for damage, 70 for a batch that is not finite again, 1 for a run that differs from the other, else 0."""
        if self.problems:
            return 65
        if self.replay is not None and self.replay.non_finite:
            return 70
        return 1 if self.difference else 0

    def text(self) -> str:
        """The report as lines."""
        verdict = f"{len(self.problems)} problems" if self.problems else "no problem"
        lines = [f"{self.run}: {verdict}"]
        lines += [f"problem: {text}" for text in self.problems] + [f"note: {text}" for text in self.notes]
        if self.replay is not None:
            lines.append(f"replay: {self.replay.text()}")
        if self.difference is not None:
            lines.append(f"compared: {self.difference or 'the metrics are equal'}")
        return "\n".join(lines)


def _strict(line: bytes) -> dict[str, Any]:
    """The JSON object of a line as `MetricsWriter` writes it; ValueError for anything else, another spelling too."""

    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    row = json.loads(line, parse_constant=reject)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step is {step!r}")
    if json.dumps(row, sort_keys=True).encode() != line:
        raise ValueError("not spelled as it is written")
    return row


def _lines(path: Path) -> tuple[list[bytes], bytes]:
    """The complete lines of a file and what follows the last of them; nothing if there is no such file."""
    *lines, rest = (path.read_bytes() if path.exists() else b"").split(b"\n")
    return lines, rest


def check_metrics(run: str | Path) -> Findings:
    """Whether every line of `metrics.jsonl` can be read, and the steps come in order, none missing and none twice."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        return Findings((f"{path} is missing",))
    lines, rest = _lines(path)
    problems, notes, last, next_rollout, skips, final = [], [], 0, 0, [], False
    for number, line in enumerate(lines, start=1):
        try:
            row = _strict(line)
        except ValueError as error:
            problems.append(f"metrics.jsonl, line {number}: {error}")
            continue
        if row["step"] < last:
            problems.append(f"metrics.jsonl, line {number}: step {row['step']} after step {last}")
        last, final = max(last, row["step"]), bool(row.get(_FINAL))
        if SKIPPED in row:
            if row["step"] != next_rollout:
                problems.append(f"metrics.jsonl, line {number}: rollout {row['step']} where {next_rollout} is due")
            next_rollout = row["step"] + 1
            skips += [row["step"]] if row[SKIPPED] != 0 else []
    if rest:
        notes.append(f"metrics.jsonl: the last line is torn after {len(rest)} bytes; a resumed run writes it again")
    notes.append(f"{next_rollout} rollouts, {'finished' if final else 'not finished'}")
    if skips:
        shown = ", ".join(map(str, skips[:10])) + (" ..." if len(skips) > 10 else "")
        notes.append(f"{len(skips)} rollouts had updates skipped: {shown}")
    return Findings(tuple(problems), tuple(notes))


def check_config(run: str | Path) -> Findings:
    """Whether `config.json` is the one whose identity `run.json` holds."""
    run, problems = Path(run), []
    header: Any = None
    for name in ("run.json", "config.json"):
        if not (run / name).is_file():
            problems.append(f"{run / name} is missing")
    if not problems:
        try:
            header = json.loads((run / "run.json").read_bytes())
        except ValueError as error:
            problems.append(f"run.json: {error}")
    if not problems:
        identity = hashlib.sha256((run / "config.json").read_bytes()).hexdigest()
        if not isinstance(header, dict) or header.get("identity") != identity:
            problems.append("config.json is not the config whose identity is in run.json")
    return Findings(tuple(problems))


def check_checkpoints(run: str | Path) -> Findings:
    """Whether every checkpoint has its files, byte for byte, and a line of the metrics ends where it says."""
    run, problems = Path(run), []
    lines, _ = _lines(run / "metrics.jsonl")
    ends = {0, *itertools.accumulate(len(line) + 1 for line in lines)}
    saved = checkpoint_metadata(run)
    for step, metadata in saved.items():
        problems += [f"checkpoint {step}: {text}" for text in manifest.verify(run / "checkpoints" / str(step))]
        if metadata.get("step") != step:
            problems.append(f"checkpoint {step}: its metadata are those of step {metadata.get('step')}")
        elif metadata.get("metrics_offset") not in ends:
            problems.append(
                f"checkpoint {step}: no line of metrics.jsonl ends at byte {metadata.get('metrics_offset')}"
            )
    return Findings(tuple(problems), (f"checkpoints: {', '.join(map(str, saved)) or 'none'}",))


def check_quarantine(run: str | Path) -> Findings:
    """Whether every quarantined batch is what was written, and what in it is not finite."""
    folder, problems, notes = Path(run) / "quarantine", [], []
    for step in stored_steps(folder):
        try:
            _, description = load_batch(folder, step)
        except QuarantineError as error:
            problems.append(str(error))
            continue
        bad = description.get("non_finite") or {}
        where = "; ".join(f"{name} of rows {rows}" for name, rows in bad.items())
        notes.append(f"quarantined: step {step}, {where + ' not finite' if where else 'its rollouts are finite'}")
    return Findings(tuple(problems), tuple(notes))


def check_kept(run: str | Path) -> Findings:
    """Whether the rollouts of every kept step, and the state before it, are what was written."""
    run, problems, steps = Path(run), [], kept_steps(run)
    for step in steps:
        try:
            load_rollouts(run, step)
        except KeptError as error:
            problems.append(str(error))
        problems += [f"kept state {step}: {text}" for text in manifest.verify(run / FOLDER / "states" / str(step))]
    return Findings(tuple(problems), (f"kept rollouts: {', '.join(map(str, steps))}",) if steps else ())


def _difference(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    shown = [f"{key} {a.get(key, 'missing')!r} / {b.get(key, 'missing')!r}" for key in keys[:8]]
    return f"{name}: {', '.join(shown)}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"


def compare(run: str | Path, other: str | Path) -> str:
    """Where the metrics of two runs part first: line, step and the numbers of both; empty if they are byte-equal.

    Args:
      run, other: folders.

    Raises:
      FileNotFoundError: one has no metrics.
    """
    paths = [Path(folder) / "metrics.jsonl" for folder in (run, other)]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path.parent} holds no run: no metrics.jsonl")
    (lines, rest), (other_lines, other_rest) = map(_lines, paths)
    for number, (a, b) in enumerate(zip(lines, other_lines), start=1):
        if a == b:
            continue
        try:
            rows = _strict(a), _strict(b)
        except ValueError as error:
            return f"line {number}: one of the two cannot be read: {error}"
        return _difference(f"line {number}, step {rows[0]['step']}", *rows)
    if len(lines) != len(other_lines):
        short, long = sorted((len(lines), len(other_lines)))
        return f"equal for {short} lines, where {run if len(lines) == short else other} ends; the other has {long}"
    return "" if rest == other_rest else f"equal for {len(lines)} lines; then a torn line differs"


def _config_difference(run: Path, other: Path) -> Iterable[str]:
    files = run / "config.txt", other / "config.txt"
    if all(file.exists() for file in files):
        changed = config_lib.diff(*map(config_lib.read_lines, files))
        if changed:
            yield f"the configs differ:\n{changed}"


def doctor(
    run: str | Path,
    *,
    replay_step: int | None = None,
    replay_newest: bool = False,
    other: str | Path | None = None,
    config: fdl.Config | None = None,
) -> Report:
    """Verifies what a run has left; on demand replays a quarantined batch and compares with another run.

    Args:
      run: the run's folder; nothing in it is changed.
      replay_step: step of the quarantined batch to replay.
      replay_newest: replay the newest one.
      other: folder of a run to compare the metrics with, line by line.
      config: the run's config, for a replay, if it uses functions that are not jentropy's.

    Raises:
      FileNotFoundError: no run in a folder.
      ReplayError, QuarantineError, CheckpointError: see `replay`.
    """
    run = Path(run)
    if not (run / "run.json").exists() and not (run / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{run} holds no run: neither run.json nor metrics.jsonl")
    checks = (check_config, check_metrics, check_checkpoints, check_quarantine, check_kept)
    found = [check(run) for check in checks]
    problems = tuple(text for findings in found for text in findings.problems)
    notes = tuple(text for findings in found for text in findings.notes)
    again = replay(run, replay_step, config) if replay_newest or replay_step is not None else None
    difference = None
    if other is not None:
        difference = compare(run, other)
        notes += tuple(_config_difference(run, Path(other)))
    return Report(run, problems, notes, again, difference)

"""What a run writes while it trains: `metrics.jsonl`, `ledger.jsonl`, `timing.jsonl` and TensorBoard events.

`metrics.jsonl` holds deterministic fields only, one JSON object per line with sorted keys and floats by `repr`, so two
equal runs write equal bytes; and so does `ledger.jsonl`, the entropy ledger, which is there only if a stage has one.
Wall times and rates go to `timing.jsonl`. A checkpoint stores the byte `offset` of the metrics; a resumed run truncates
the file there, drops the lines of later steps from the others, and writes the missing lines again.
"""

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import jax
import numpy as np

from jentropy.train.ledger import PREFIX as LEDGER
from jentropy.train.progress import Progress as Progress

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def divide(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """`sum / count` of every metric as a Python float; a metric with count 0 is left out.

    Args:
      metrics: `(sum, count)` scalars by name, fetched from the device at once.
    """
    for leaf in jax.tree.leaves(dict(metrics)):
        if isinstance(leaf, jax.Array) and jax.default_backend() != "cpu":
            leaf.copy_to_host_async()
    with jax.transfer_guard_device_to_host("allow"):  # for scalars on a CPU `jax.device_get` takes ten times as long
        fetched = {name: (np.asarray(total), np.asarray(count)) for name, (total, count) in metrics.items()}
    return {name: float(total) / float(count) for name, (total, count) in fetched.items() if float(count) != 0}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` or `timing.jsonl`; a torn last line is left out, a missing file is empty.

    The strings `nan`, `inf` and `-inf`, which stand for what JSON cannot say, come back as floats.

    Raises:
      ValueError: a line before the last is no JSON object; file and line number are named.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: not a JSON object")
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    return {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()}


def _line(step: int, values: Mapping[str, Any]) -> bytes:
    """One JSON line of `step` and `values`."""

    def plain(value: Any) -> Any:
        value = value.item() if isinstance(value, (np.generic, np.ndarray, jax.Array)) else value
        return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

    row = {name: plain(value) for name, value in values.items()} | {"step": int(step)}
    return json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n"


class MetricsWriter:
    """Writes the metrics of one run into `directory`; a context manager.

    Args:
      directory: created if missing; gets `metrics.jsonl`, `timing.jsonl` and the folder `tensorboard`, and with the
        first metric of the entropy ledger `ledger.jsonl`.
      resume_offset: None for a new run. To resume, the `offset()` that the checkpoint holds (0 if there is none yet):
        the metrics are truncated there.
      resume_step: the first step that the resumed run writes: lines of other files than the metrics and TensorBoard
        events from there on are void. By default the one after the last line that the truncation leaves.

    Raises:
      FileExistsError: a new run in a folder that has metrics.
      ValueError: the metrics have no line that ends at `resume_offset`.
    """

    def __init__(self, directory: str | Path, resume_offset: int | None = None, resume_step: int | None = None) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        metrics, timing, self._ledger_path = (directory / f"{n}.jsonl" for n in ("metrics", "timing", "ledger"))
        if resume_offset is not None:
            resume_step = _truncate(metrics, (timing, self._ledger_path), resume_offset, resume_step)
        elif metrics.exists() and metrics.stat().st_size:
            raise FileExistsError(f"{metrics} exists: resume the run or choose another folder")
        self._metrics = metrics.open("ab")
        self._timing = timing.open("ab")
        self._ledger: BinaryIO | None = None
        self._tensorboard = _TensorBoard(directory / "tensorboard", resume_step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line of numbers, strings or None that depend on the run's seed and config only.

        A step may have several lines. NaN and infinities are written as the strings `nan`, `inf` and `-inf`. Metrics of
        the entropy ledger, `ledger/...`, go to a line of its own file, together with the `stage`.
        """
        ledger = {name: value for name, value in metrics.items() if name.startswith(LEDGER)}
        _append(self._metrics, _line(step, {name: value for name, value in metrics.items() if name not in ledger}))
        if ledger:
            self._ledger = self._ledger or self._ledger_path.open("ab")
            stage = {"stage": metrics["stage"]} if "stage" in metrics else {}
            _append(self._ledger, _line(step, {**stage, **ledger}))
        self._tensorboard.write(step, metrics)

    def write_timing(self, step: int, timing: Mapping[str, Any]) -> None:
        """Appends one line of wall times (seconds) and rates (tokens per second)."""
        _append(self._timing, _line(step, timing))
        self._tensorboard.write(step, timing)

    def offset(self) -> int:
        """Bytes of `metrics.jsonl` so far, all of them on disk, as the ledger is: what a checkpoint stores."""
        for file in (self._metrics, self._ledger):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        return self._metrics.tell()

    def close(self) -> None:
        """Closes the files."""
        for file in (self._metrics, self._timing, self._ledger):
            if file is not None:
                with _naming(file):
                    file.close()
        self._tensorboard.close()


@contextlib.contextmanager
def _naming(file: BinaryIO) -> Iterator[None]:
    """Puts the name of the file into an `OSError`: those of open files have none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def _append(file: BinaryIO, line: bytes) -> None:
    with _naming(file):
        file.write(line)
        file.flush()


def _truncate(metrics: Path, others: Iterable[Path], offset: int, step: int | None) -> int:
    """Cuts the metrics at `offset`, drops lines of others from `step` on; returns `step` or what it is by default."""
    kept = metrics.read_bytes()[:offset] if metrics.exists() else b""
    if len(kept) != offset or not (kept or b"\n").endswith(b"\n"):
        raise ValueError(f"{metrics} has no line that ends at byte {offset}, where the checkpoint says it does")
    if metrics.exists():
        os.truncate(metrics, offset)
    first = max((row["step"] + 1 for row in read_metrics(metrics)), default=0) if step is None else step
    for path in others:
        if path.exists():
            lines = [(line, _parse(line)) for line in path.read_bytes().splitlines()]
            replacement = path.with_suffix(".tmp")
            replacement.write_bytes(b"".join(line + b"\n" for line, row in lines if row and row["step"] < first))
            replacement.replace(path)
    return first


class _TensorBoard:
    """Scalars as TensorBoard events, written at once; the first failure is a warning and ends it.

    The file is opened at the first write. On resume, events from `resume_step` on are marked as void.
    """

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        self._directory = directory
        self._resume_step = resume_step
        self._writer: Any = None
        self._failed = False

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._failed:
            return
        try:
            self._write(step, values)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            self._failed = True
            warnings.warn(f"TensorBoard events are switched off: {error!r}", RuntimeWarning, stacklevel=3)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            self._writer = self._open()
        numbers = {name: value for name, value in values.items() if value is not None and not isinstance(value, str)}
        scalars = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=int(step), summary=Summary(value=scalars)))
        self._writer.flush()

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._directory.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in self._directory.iterdir())
        writer = EventsWriter(str(self._directory / "events"), filename_suffix=f".{number}")
        if self._resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            writer.write_event(Event(wall_time=time.time(), step=self._resume_step, session_log=start))
        return writer

    def close(self) -> None:
        if self._writer is not None and not self._failed:
            self._writer.close()

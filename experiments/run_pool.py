"""Makes many runs, one after the other in this process or in several: kept when finished, resumed when interrupted.

Runs of one program, such as the seeds of a method, stay in one process as long as there is other work for the others,
so that they share its compilations. A run that fails is recorded in `failed.json` of its folder. One whose numbers were
not finite has failed for good, to make it again delete its folder; any other failure is tried again by the next call.

Several processes share the cores, so each has its matrix products computed by one thread (`FLAGS`). The metrics of
plain GRPO, in the SHIFT and in the LAW setting, are bitwise those of `jentropy train` on two cores. CPU-seconds of 90
rollouts, two processes at a time on two cores: 13.7 with the flag and 13.2 without, but then 48 once, when others used
the cores as well. 12.2 with a thread pool of one thread (NPROC=1), whose sums differ in the last bits.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl
import jax
from tqdm import tqdm

from jentropy import config as config_lib
from jentropy.train.lock import LockedError
from jentropy.train.loop import train
from jentropy.train.metrics import read_metrics
from jentropy.train.quarantine import NumericError
from jentropy.train.resume_rules import find_changes
from jentropy.train.signals import PreemptedError

FAILED = "failed.json"
FLAGS = "--xla_cpu_multi_thread_eigen=false"
_LABELS = re.compile(r"name|checkpoint_every|sampler_tolerance|hang_limit|task\.data_dir|keep_rollouts(\.\d+)?")
"""Fields of a config on which no figure depends."""


class Task(NamedTuple):
    """One run.

    Attributes:
      config: of the experiment.
      out: folder of the run.
      program: what its compiled step is called; runs with one name share it.
      allow_change: keep or resume a run that was made with another config.
    """

    config: fdl.Config
    out: Path
    program: str
    allow_change: bool = False


class Failure(NamedTuple):
    """Why a run has no figures.

    Attributes:
      error: name of the exception's class.
      message: first line of what it says.
      lasting: whether it would fail again.
    """

    error: str
    message: str
    lasting: bool = False

    def __str__(self) -> str:
        return f"{self.error}: {self.message}"


Work = Callable[[Task], Failure | None]


def is_finished(out: Path) -> bool:
    """Whether the run in `out` has its final evaluation."""
    lines = read_metrics(out / "metrics.jsonl")
    return bool(lines) and bool(lines[-1].get("final"))


def read_failure(out: Path) -> Failure | None:
    """What `failed.json` in the run's folder says."""
    path = out / FAILED
    return Failure(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _record(out: Path, failure: Failure) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / FAILED).write_text(json.dumps(failure._asdict(), indent=1) + "\n", encoding="utf-8")


def finished(out: Path, config: fdl.Config, *, allow_change: bool = False, quiet: bool = False) -> list[dict[str, Any]]:
    """The metrics of a run, which is made unless it is there."""
    path = out / "metrics.jsonl"
    if not is_finished(out):
        train(config, out, resume=path.exists(), allow_change=allow_change, quiet=quiet)
    return read_metrics(path)


def attempt(task: Task) -> Failure | None:
    """Makes the run, or the rest of it; returns why it failed, which `failed.json` says then."""
    (task.out / FAILED).unlink(missing_ok=True)
    try:
        finished(task.out, task.config, allow_change=task.allow_change, quiet=True)
        return None
    except PreemptedError:
        raise
    except Exception as error:
        logging.getLogger(__name__).exception("%s failed", task.config.name)
        text = str(error).partition("\n")[0]
        failure = Failure(type(error).__name__, text, lasting=isinstance(error, NumericError))
        if not isinstance(error, LockedError):
            _record(task.out, failure)
        return failure


def check_unchanged(tasks: Sequence[Task]) -> None:
    """Raises `ConfigError` if a run that is there was made with another config."""
    changed = []
    for task in tasks:
        path = task.out / "config.txt"
        if path.exists() and not task.allow_change:
            found = find_changes(config_lib.read_lines(path), config_lib.flatten(task.config))
            changed += [f"{task.out}:{change}" for change in found if not _LABELS.fullmatch(change.path)]
    if changed:
        raise config_lib.ConfigError(
            "runs were made with another config; delete them, choose another --out, or keep them with --allow-change:\n"
            + "\n".join(changed)
        )


def choose(pending: Sequence[Task], held: Collection[str], last: str | None) -> Task:
    """The next of the pending tasks for a process.

    Args:
      pending: at least one.
      held: programs that other processes are at.
      last: the program that this one was at.

    Returns:
      One of the program `last`, else of one that is not held, else of any; of several programs the one of most tasks.
    """
    counts = {program: sum(task.program == program for task in pending) for program in {t.program for t in pending}}

    def rank(task: Task) -> tuple[bool, bool, int]:
        return task.program != last, task.program in held, -counts[task.program]

    return min(pending, key=rank)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for processes that are started meanwhile."""
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, work: Work) -> None:
    """What a process does: the tasks that it is sent, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent passes it on as SIGTERM
    with contextlib.suppress(EOFError):
        while True:
            task = pipe.recv()
            try:
                pipe.send(work(task))
            except PreemptedError as error:
                sys.exit(error.exit_code)


class _Process:
    """A process and the task that it is at."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work))
        flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
        with _environment(XLA_FLAGS=flags, JAX_PLATFORMS=os.environ.get("JAX_PLATFORMS", "cpu")):
            self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.program: str | None = None

    def give(self, task: Task) -> None:
        self.task, self.program = task, task.program
        self.pipe.send(task)

    def result(self) -> tuple[Failure | None, bool]:
        """What became of the task, and whether the process is still there."""
        try:
            return self.pipe.recv(), True
        except (EOFError, ConnectionError):
            self.process.join()
            return Failure("ProcessDied", f"exit status {self.process.exitcode}"), False

    def stop(self) -> None:
        """Ends the process: at the next step boundary, with a checkpoint, if it is in a run."""
        self.pipe.close()
        if self.task is not None:
            self.process.terminate()


def run_all(tasks: Sequence[Task], jobs: int, work: Work, report: Callable[[Task, Failure | None], None]) -> None:
    """Has all tasks done; calls `report` here whenever one is.

    Args:
      tasks: in the order of preference.
      jobs: processes, at least 1; with 1 it is this one.
      work: a function of a module.
      report: called with every task and why it failed, if it did.

    Raises:
      PreemptedError: a signal stopped the run in this process.
      KeyboardInterrupt: a signal stopped the runs in other processes; their checkpoints are committed.
    """
    pending, processes = list(tasks), []
    if jobs == 1:
        last = None
        while pending:
            task = choose(pending, (), last)
            last = task.program
            pending.remove(task)
            report(task, work(task))
        return
    try:
        while True:
            while pending and len(processes) < jobs:
                processes.append(_Process(work))
            for process in processes:
                if process.task is None and pending:
                    held = {other.program for other in processes if other.task is not None}
                    task = choose(pending, held, process.program)
                    pending.remove(task)
                    process.give(task)
            busy = [process for process in processes if process.task is not None]
            if not busy:
                return
            ready = wait([process.pipe for process in busy])
            for process in [process for process in busy if process.pipe in ready]:
                failure, alive = process.result()
                task, process.task = process.task, None
                if not alive:
                    processes.remove(process)
                    _record(task.out, failure)
                report(task, failure)
    finally:
        for process in processes:
            process.stop()
        for process in processes:
            process.process.join()


class Progress:
    """A bar over runs on a terminal, else a line per run; with an estimate of what is left."""

    def __init__(self, total: int, kept: int) -> None:
        self._total, self._done, self._kept, self._start = total, kept, kept, time.monotonic()
        self._bar = tqdm(total=total, initial=kept, unit="run", disable=None, dynamic_ncols=True)

    def __call__(self, task: Task, failure: Failure | None) -> None:
        self._done += 1
        self._bar.update()
        if failure is not None or self._bar.disable:
            seconds = (time.monotonic() - self._start) / (self._done - self._kept) * (self._total - self._done)
            text = f"{self._done}/{self._total} {task.config.name}: {failure or 'finished'}"
            self._bar.write(f"{text}, left {tqdm.format_interval(seconds)}", file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


def make_runs(tasks: Sequence[Task], jobs: int) -> None:
    """Makes those of the runs that are not there yet.

    Raises:
      ConfigError: a run that is there was made with another config.
      PreemptedError, KeyboardInterrupt: see `run_all`.
    """
    check_unchanged(tasks)
    pending = [task for task in tasks if not is_finished(task.out) and not _failed_for_good(task.out)]
    if pending:
        with contextlib.closing(Progress(len(tasks), len(tasks) - len(pending))) as progress:
            run_all(pending, min(jobs, len(pending)), attempt, progress)


def _failed_for_good(out: Path) -> bool:
    failure = read_failure(out)
    return failure is not None and failure.lasting


def default_jobs() -> int:
    """Processes: one per core that this one may use; one if there is an accelerator."""
    return len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 1

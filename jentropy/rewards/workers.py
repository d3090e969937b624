"""Graders in worker processes: a hang, crash, flood or exception costs its rows, never the run.

A worker is a fresh interpreter (`worker_main.py`; nothing is forked after JAX has started, and nothing of the main
program is imported) in a session of its own. Rows and rewards travel as JSON in frames of bounded size, so nothing
that comes back is ever unpickled. A batch is cut into calls of at most 64 rows; a call that fails is repeated row by
row, and a row that fails alone abstains and is counted. So a function must grade each row by itself, whatever rows
come with it. What takes longer than its deadline depends on the machine: such rows are not reproducible.

This is no sandbox. A worker has the rights of the run, less memory beyond a limit, and may open files and sockets; a
process that it starts in a session of its own outlives it.
"""

import atexit
import collections
import dataclasses
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jentropy import base
from jentropy.rewards import worker_main
from jentropy.rewards.base import RewardError, RewardTypeError

FAILURES = ("hang", "crash", "flood", "exception")
"""Why a row may have no reward besides the grader's own abstention."""

_ROWS_PER_CALL = 64
_START_SECONDS = 60.0
_FAILED_STARTS = 3
_PRINTED_BYTES = 64 * 1024
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerGrader:
    """A grader that runs in worker processes: what `TextReward.function` may be. A value, hashable.

    Attributes:
      target: `package.module:name` or `/path/to/file.py:name`.
      deadline: seconds for one call.
      num_workers: processes.
      memory_mib: address space of a worker, MiB; None is unlimited.
      max_failed: largest fraction of a batch's rows that may fail; more is an error.
    """

    target: str
    deadline: float = 10.0
    num_workers: int = 2
    memory_mib: int | None = 4096
    max_failed: float = 0.5

    def __post_init__(self):
        base.require(0 < self.deadline < math.inf, "deadline", self.deadline, "positive and finite")
        base.require(self.num_workers >= 1, "num_workers", self.num_workers, "at least 1")
        base.require(self.memory_mib is None or self.memory_mib >= 64, "memory_mib", self.memory_mib, "at least 64")
        base.require(0 <= self.max_failed <= 1, "max_failed", self.max_failed, "in [0, 1]")

    def __call__(self, prompts: list[str], completions: list[str], **fields: list) -> list[float | None]:
        """One number per row, None where the grader abstained or failed. Raises as `Pool.grade`."""
        graded = pool(self).grade(prompts, completions, fields)
        return [float(value) if valid else None for value, valid in zip(graded.values, graded.is_valid)]


class Graded(NamedTuple):
    """What a batch was given.

    Attributes:
      values: `[B]` float32, 0 where there is no reward.
      is_valid: `[B]` bool, False where the grader abstained or failed.
      counters: rows by what became of them: `FAILURES`, and `abstained`.
    """

    values: np.ndarray
    is_valid: np.ndarray
    counters: dict[str, int]


class Pool:
    """The workers of one grader. For one thread.

    Args:
      grader: what they run.
    """

    def __init__(self, grader: WorkerGrader) -> None:
        self._grader = grader
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self.totals: collections.Counter[str] = collections.Counter()

    def grade(self, prompts: Sequence[str], completions: Sequence[str], fields: Mapping[str, Sequence]) -> Graded:
        """Grades B rows.

        Args:
          prompts: B texts.
          completions: B texts.
          fields: lists of B JSON values by name.

        Raises:
          RewardTypeError: the function returned no list, or something that is neither a number nor None.
          RewardError: wrong length, a value that is not finite in float32, a function that cannot be loaded, or more
            than `max_failed` of the rows failed.
        """
        batch = {"prompts": list(prompts), "completions": list(completions), "fields": dict(fields)}
        size = len(batch["completions"])
        found = _Batch(self._grader.target, np.zeros(size, np.float32), np.zeros(size, bool))
        calls = collections.deque(self._split(size))
        try:
            while calls or any(worker.rows for worker in self._workers):
                self._assign(calls, batch)
                self._wait()
                self._collect(calls, found)
        except BaseException:
            self.close()  # rows on their way must not be taken for the next batch's
            raise
        failed = sum(found.counters[kind] for kind in FAILURES)
        self.totals.update(found.counters)
        if failed > self._grader.max_failed * size:
            raise RewardError(f"reward {self._grader.target!r} failed for {failed} of {size} rows; {found.last}")
        return Graded(found.values, found.is_valid, dict(found.counters))

    def close(self) -> None:
        """Ends the workers; `grade` starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._failed_starts = 0

    def _split(self, size: int) -> list[list[int]]:
        step = min(_ROWS_PER_CALL, max(1, -(-size // self._grader.num_workers)))
        return [list(range(start, min(start + step, size))) for start in range(0, size, step)]

    def _assign(self, calls: collections.deque[list[int]], batch: Mapping[str, Any]) -> None:
        """Gives calls to idle workers and starts as many workers as there is work for."""
        for worker in self._workers:
            if worker.is_idle and calls:
                worker.begin(calls.popleft(), batch)
        starting = sum(worker.is_starting for worker in self._workers)
        while starting < len(calls) and len(self._workers) < self._grader.num_workers:
            self._workers.append(_Worker(self._grader))
            starting += 1

    def _wait(self) -> None:
        """Waits until a worker has something to say or must be ended."""
        poll = select.poll()
        busy = [worker for worker in self._workers if not worker.is_idle]
        for worker in busy:
            for descriptor, events in worker.events():
                poll.register(descriptor, events)
        expires = min((worker.expires for worker in busy), default=0.0)
        poll.poll(max(0.0, expires - time.monotonic()) * 1e3 + 1.0)

    def _collect(self, calls: collections.deque[list[int]], found: "_Batch") -> None:
        for worker in list(self._workers):
            if worker.is_idle:
                continue
            starting, rows = worker.is_starting, worker.rows
            outcome = worker.advance()
            if isinstance(outcome, str):
                worker.kill()
                self._workers.remove(worker)
                self._failed_starts += starting
                if self._failed_starts > _FAILED_STARTS:
                    raise RewardError(f"reward {found.target!r}: its workers do not start ({outcome})")
                if starting:
                    continue
                outcome = {"failure": outcome}
            if outcome is None:
                continue
            if outcome.get("ready"):
                self._failed_starts = 0
                continue
            if "failed" in outcome:
                raise RewardError(f"reward {found.target!r} cannot be loaded: {outcome['failed']}")
            failure = "exception" if "exception" in outcome else outcome.get("failure")
            if failure is None:
                found.fill(rows, outcome)
            elif len(rows) > 1:
                calls.extend([row] for row in rows)
            else:
                found.fail(rows[0], failure, outcome.get("exception", f"the worker was ended by a {failure}"))


@dataclasses.dataclass
class _Batch:
    """What is known of a batch so far."""

    target: str
    values: np.ndarray
    is_valid: np.ndarray
    counters: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    last: str = ""

    def fail(self, row: int, kind: str, message: str) -> None:
        self.counters[kind] += 1
        self.last = f"the last, row {row}: {message}"

    def fill(self, rows: Sequence[int], reply: Mapping[str, Any]) -> None:
        """Takes over what a worker replied for `rows`, or raises naming the function and the row."""
        if "type" in reply:
            raise RewardTypeError(f"reward {self.target!r} must return a list, got {reply['type']}")
        if "length" in reply:
            raise RewardError(f"reward {self.target!r} returned {reply['length']} values for {len(rows)} rows")
        for row, value in zip(rows, reply["values"]):
            if value is None:
                self.counters["abstained"] += 1
            elif not abs(value) <= _FLOAT32_MAX:
                raise RewardError(f"reward {self.target!r} returned {value!r} for row {row}, not finite in float32")
            else:
                self.values[row], self.is_valid[row] = value, True
        if "bad" in reply:
            index, kind, text = reply["bad"]
            raise RewardTypeError(
                f"reward {self.target!r} returned {kind} {text} for row {rows[index]}, not a number or None"
            )


class _Worker:
    """One process, its socket and what it prints. Never blocks."""

    def __init__(self, grader: WorkerGrader) -> None:
        self._deadline = grader.deadline
        self._socket, theirs = socket.socketpair()
        self._printed, writes = os.pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", worker_main.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=writes, stderr=writes, pass_fds=[theirs.fileno()],
                start_new_session=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )  # fmt: skip
        os.close(writes)
        self._socket.setblocking(False)
        os.set_blocking(self._printed, False)
        self.rows: list[int] = []
        self.is_idle, self.is_starting = False, True
        setup = {
            "target": grader.target,
            "deadline": grader.deadline,
            "memory_bytes": None if grader.memory_mib is None else grader.memory_mib * 2**20,
            "path": [os.path.abspath(place) for place in sys.path],
        }
        self._send(setup, _START_SECONDS, 0)

    def begin(self, rows: list[int], batch: Mapping[str, Any]) -> None:
        """Starts the grading of some rows of a batch."""
        self.rows, self.is_idle = rows, False
        message = {name: [batch[name][row] for row in rows] for name in ("prompts", "completions")}
        fields = {name: [column[row] for row in rows] for name, column in batch["fields"].items()}
        self._send({**message, "fields": fields}, self._deadline, len(rows))

    def _send(self, message: Mapping[str, Any], seconds: float, num_rows: int) -> None:
        data = json.dumps(message).encode()
        self._outgoing = bytearray(len(data).to_bytes(8, "big") + data)
        self._incoming = bytearray()
        self._num_printed, self._prints = 0, True
        self._limit = 64 * num_rows + 32 * worker_main.MAX_TEXT
        self.expires = time.monotonic() + seconds

    def events(self) -> list[tuple[int, int]]:
        """File descriptors to wait for, with the events."""
        wanted = select.POLLIN | (select.POLLOUT if self._outgoing else 0)
        printed = [(self._printed, select.POLLIN)] if self._prints else []
        return [(self._socket.fileno(), wanted), *printed]

    def advance(self) -> dict[str, Any] | str | None:
        """Moves bytes. Returns the reply, why the worker must be ended, or None if it is not done."""
        if self._flooded():
            return "flood"
        try:
            if self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
            part = self._socket.recv(1 << 16)
        except BlockingIOError:
            return self._unfinished()
        except OSError:
            return "crash"
        if not part:
            return "crash"
        self._incoming += part
        size = int.from_bytes(self._incoming[:8], "big") if len(self._incoming) >= 8 else 0
        if size > self._limit or len(self._incoming) > size + 8 > 8:
            return "flood"
        if len(self._incoming) < 8 or len(self._incoming) < size + 8:
            return self._unfinished()
        return self._reply(bytes(self._incoming[8:]))

    def _unfinished(self) -> str | None:
        return "hang" if time.monotonic() > self.expires else None

    def _reply(self, data: bytes) -> dict[str, Any] | str:
        try:
            reply = json.loads(data)
        except ValueError:
            return "flood"
        if not isinstance(reply, dict):
            return "flood"
        self.rows, self.is_idle, self.is_starting = [], True, False
        return reply

    def _flooded(self) -> bool:
        """Whether more has been printed than is allowed; what was printed is dropped."""
        while self._prints and self._num_printed <= _PRINTED_BYTES:
            try:
                part = os.read(self._printed, 1 << 16)
            except BlockingIOError:
                break
            self._prints = bool(part)
            self._num_printed += len(part)
        return self._num_printed > _PRINTED_BYTES

    def kill(self) -> None:
        """Ends the process and what it started in its session."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()
        self._process.wait()
        self._socket.close()
        os.close(self._printed)


_pools: dict[WorkerGrader, Pool] = {}


def pool(grader: WorkerGrader) -> Pool:
    """The workers of a grader: one pool per grader and process."""
    if grader not in _pools:
        _pools[grader] = Pool(grader)
    return _pools[grader]


def counters() -> dict[str, int]:
    """Rows by what became of them (`FAILURES`, `abstained`), of all graders since the process started."""
    total = collections.Counter({kind: 0 for kind in (*FAILURES, "abstained")})
    for each in _pools.values():
        total.update(each.totals)
    return dict(total)


@atexit.register
def close_all() -> None:
    """Ends all workers of all graders."""
    for each in _pools.values():
        each.close()

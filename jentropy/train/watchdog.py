"""Says where a run hangs, and ends it.

A thread of its own looks at how long the current part of the run has taken. One that takes far longer than such parts
did before has the stacks of all threads written down; one that does not end has the process exit with status 77. Only
the standard library is imported.
"""

import collections
import contextlib
import faulthandler
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

EXIT_CODE = 77

_MEMORY = 64
"""Durations of each kind that the median is taken over."""

_BACKSTOP = 5.0
"""Seconds after `limit` without a look of the watchdog itself, after which faulthandler ends the process."""

_PATIENCE = 2.0
"""Seconds that writing the stacks to one place may take."""


class Watchdog:
    """Watches the run while entered; the run calls `beat` whenever it gets on.

    Time in which the whole process stood still (SIGSTOP, a sleeping laptop) does not count. Code that keeps Python's
    global lock for `limit` seconds stops this thread too: then faulthandler's own, which needs no lock, writes the
    stacks and exits, with status 1, the only one it has.

    Args:
      path: file the stacks are appended to; they go to standard error as well.
      slow_after: seconds that a part may always take before its stacks are written.
      slow_factor: times its median duration that a part may take before its stacks are written.
      limit: seconds after which the process exits; None for never.
      interval: seconds between two looks.

    Raises:
      ValueError: a number is not positive.
    """

    def __init__(
        self, path: str | os.PathLike, *,
        slow_after: float = 60.0, slow_factor: float = 20.0, limit: float | None = 1800.0, interval: float = 1.0,
    ) -> None:  # fmt: skip
        numbers = {"slow_after": slow_after, "slow_factor": slow_factor, "limit": limit, "interval": interval}
        for name, value in numbers.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        self.path = Path(path)
        self._slow_after, self._slow_factor, self._limit, self._interval = slow_after, slow_factor, limit, interval
        self._durations: dict[str, collections.deque[float]] = {}
        self._mutex, self._closed = threading.Lock(), threading.Event()
        self._begin("start")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _begin(self, doing: str) -> None:
        self._doing, self._began, self._waited, self._told = doing, time.monotonic(), 0.0, False

    def beat(self, doing: str = "step") -> None:
        """Says that the part before has ended and `doing` begins; parts of one name share a median."""
        with self._mutex:
            known = self._durations.setdefault(self._doing, collections.deque(maxlen=_MEMORY))
            known.append(time.monotonic() - self._began)
            self._begin(doing)

    def __enter__(self) -> "Watchdog":
        with self._mutex:
            self._begin("start")
        self._arm()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        if self._limit is not None:
            faulthandler.dump_traceback_later(self._limit + _BACKSTOP, file=2, exit=True)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._interval):
            self._arm()
            now = time.monotonic()
            self._look(min(now - last, 2 * self._interval))
            last = now

    def _look(self, passed: float) -> None:
        """Counts `passed` seconds for the current part and does what is due."""
        with self._mutex:
            self._waited += passed
            doing, waited, told = self._doing, self._waited, self._told
            known = self._durations.get(doing)
            typical = statistics.median(known) if known else 0.0
            is_over = self._limit is not None and waited > self._limit
            is_slow = not told and waited > max(self._slow_after, self._slow_factor * typical)
            self._told = told or is_slow
        if is_over or is_slow:
            before = f"{len(known)} before took {typical:.3g} s (median)" if known else "there was none before"
            after = f"; exit {EXIT_CODE}" if is_over else ""
            self._dump(f"watchdog: this {doing} has taken {waited:.3g} s, {before}{after}")
        if is_over:
            os._exit(EXIT_CODE)

    def _dump(self, message: str) -> None:
        """Each place gets its own thread: a full pipe or a dead disk keeps neither the other nor the exit waiting."""
        text = f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n".encode() + _stacks()
        writers = [threading.Thread(target=write, args=(text,), daemon=True) for write in (_to_stderr, self._to_file)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(_PATIENCE)

    def _to_file(self, text: bytes) -> None:
        with contextlib.suppress(OSError), self.path.open("ab") as file:
            file.write(text)


def _to_stderr(text: bytes) -> None:
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(2, text) :]


def _stacks() -> bytes:
    """The stacks of all threads, by way of a temporary file: faulthandler keeps the global lock while it writes."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
    return b"(the stacks could not be written)\n"

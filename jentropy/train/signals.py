"""SIGTERM and SIGINT as a request to stop at the next step boundary.

Python runs a signal's handler in the main thread only, between two instructions, and merges what arrives meanwhile: a
second signal during a long compilation would be lost until its end. So a thread reads the bytes that the interpreter's
C handler writes to the wake-up descriptor, whatever the main thread does. Only the standard library is imported.
"""

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

_SAME = 0.5
"""Seconds after the first signal in which more count as the same: timeout(1) and schedulers signal a process, then its
group."""


class PreemptedError(RuntimeError):
    """The run was asked to stop and has done so; its checkpoint is committed."""

    exit_code = 75


class StopSignals:
    """While entered, the first signal sets `requested` and a second one ends the process at once.

    The second one ends it with status 128 + its number, as a shell reports it, and without any clean-up. Outside the
    main thread entering does nothing, because Python lets no other thread set handlers.

    Args:
      signals: those that are caught.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self._signals = tuple(signals)
        self._received: int | None = None
        self._write: int | None = None
        self._previous: tuple[int, dict[signal.Signals, Any]] = (-1, {})
        self._thread = threading.Thread(target=lambda: None)

    @property
    def requested(self) -> str | None:
        """The name of the signal that asked to stop, such as `SIGTERM`; None as long as there was none."""
        return None if self._received is None else signal.Signals(self._received).name

    def check(self, step: int) -> None:
        """Raises `PreemptedError` if a stop is requested; once the checkpoint of `step`, if not 0, is committed."""
        if self.requested is not None:
            what = f"after {step} rollouts with a checkpoint" if step else "before the first rollout"
            raise PreemptedError(f"{self.requested}: stopped {what}; resume the run")

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, args=(read,), name="stop-signals", daemon=True)
        self._thread.start()
        wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = wakeup, {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._write is None:
            return
        wakeup, handlers = self._previous
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was set by C code
        signal.set_wakeup_fd(wakeup)
        os.close(self._write)
        self._write = None
        self._thread.join()

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        del frame
        self._received = self._received or number

    def _watch(self, read: int) -> None:
        """Reads numbers of signals until the pipe is closed."""
        first: float | None = None
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while data := pipe.read(1):
                number, now = data[0], time.monotonic()
                if number not in self._signals:
                    continue
                if first is None:
                    first = now
                    self._note(number)
                    name = signal.Signals(number).name
                    os.write(2, f"\n{name}: stopping at the next step boundary; a second one exits at once\n".encode())
                elif now - first > _SAME:
                    os._exit(128 + number)

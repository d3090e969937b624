"""One folder, one run: a lock file that names the process that writes there.

The lock is `flock(2)` on the file `run.lock`: the kernel gives it to one process and takes it back however that process
ends, so a dead run's lock needs no guess about process numbers. The owner's name in the file is for messages, and for
file systems whose locks do not reach other machines: there a lock that was never released is not taken over, because
nobody here can see whether its owner still runs. The file stays when the lock is released; it is empty then.

Only the standard library is imported, so that a lock costs nothing before JAX is there.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

FILE = "run.lock"

_PATIENCE = 0.5
"""Seconds in which a process that has just taken the lock is expected to write its name."""


class LockedError(RuntimeError):
    """Another run uses the folder; the message names it."""

    exit_code = 73


class Owner(NamedTuple):
    """A process that has or had the lock: its number, machine, that machine's current boot, and the time (UTC)."""

    pid: int
    host: str
    boot: str
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"

    def shares_machine(self, other: "Owner") -> bool:
        """Whether both ran on one machine: containers have names of their own, but one kernel."""
        return self.host == other.host or (self.boot != "" and self.boot == other.boot)


def this_process() -> Owner:
    """This process as an owner."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Owner(os.getpid(), socket.gethostname(), boot.read_text().strip() if boot.exists() else "", started)


class RunLock:
    """Holds the lock of a run's folder; a context manager, or call `release`.

    Of a distributed run only one process takes it. A second lock in the same process fails as well.

    Args:
      folder: created if missing.

    Attributes:
      path: the lock file.
      reclaimed: the dead process whose lock was taken over, or None.

    Raises:
      LockedError: another run has the lock, or one on another machine never released it.
      OSError: the file cannot be created, is a symbolic link, or lies on a file system without locks.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._descriptor: int | None = None
        me = this_process()
        with contextlib.ExitStack() as undo:
            descriptor = _lock(self.path, me)
            undo.callback(os.close, descriptor)
            self.reclaimed = _read(descriptor)
            if self.reclaimed is not None and not self.reclaimed.shares_machine(me):
                raise LockedError(
                    f"{folder} was not released by {self.reclaimed}, and {me.host} cannot see whether that still runs; "
                    f"if it does not, delete {self.path}"
                )
            _write(descriptor, me)
            undo.pop_all()
        self._descriptor = descriptor

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lock back; further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _lock(path: Path, me: Owner) -> int:
    """A locked descriptor of the file that is at `path` now: someone may delete the file at any time."""
    while True:
        with contextlib.ExitStack() as undo:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor, me) or "another process"
                raise LockedError(f"{path.parent} is in use by {holder}") from None
            except OSError as error:
                raise OSError(
                    error.errno, f"this file system cannot lock files ({error.strerror})", str(path)
                ) from error
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                undo.pop_all()
                return descriptor


def _write(descriptor: int, owner: Owner) -> None:
    text = json.dumps(owner._asdict()).encode() + b"\n"
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
    os.fsync(descriptor)


def _read(descriptor: int) -> Owner | None:
    """Who is named in the file; None if it is empty or no such text."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0).partition(b"\n")[0])
        return Owner(int(found["pid"]), str(found["host"]), str(found["boot"]), str(found["started"]))
    except (ValueError, TypeError, KeyError):
        return None


def _holder(descriptor: int, me: Owner) -> Owner | None:
    """Who has the lock that we did not get; waits a moment for one who has only just taken it."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        owner = _read(descriptor)
        if (owner is not None and not _is_dead(owner, me)) or time.monotonic() > deadline:
            return owner
        time.sleep(0.01)


def _is_dead(owner: Owner, me: Owner) -> bool:
    if not owner.shares_machine(me):
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False

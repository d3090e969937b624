"""One folder, one run: the lock among processes. The children load the module by its path, without JAX."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jentropy.train import lock
from jentropy.train.lock import LockedError, RunLock

CHILD = """
import runpy, sys, time
module, folder, start = sys.argv[1:]
lock = runpy.run_path(module)
time.sleep(max(0, float(start) - time.time()))
try:
    with lock["RunLock"](folder):
        print("held", flush=True)
        sys.stdin.read()
except lock["LockedError"] as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def start(folder, at=0.0):
    command = [sys.executable, "-I", "-c", CHILD, lock.__file__, str(folder), str(at)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def holder(folder):
    """A process that has the lock."""
    child = start(folder)
    assert child.stdout.readline() == "held\n"
    return child


def finish(child):
    child.communicate(timeout=30)
    return child.returncode


def test_of_two_runs_started_together_exactly_one_survives(tmp_path):
    for trial in range(20):
        children = [start(tmp_path, time.time() + 0.15) for _ in range(2)]
        lines = [child.stdout.readline() for child in children]
        assert sorted(line == "held\n" for line in lines) == [False, True], f"trial {trial}: {lines}"
        winner, loser = (children[lines.index("held\n")], children[1 - lines.index("held\n")])
        assert f"{tmp_path} is in use by process {winner.pid} on " in lines[children.index(loser)]
        assert (finish(loser), finish(winner)) == (73, 0), f"trial {trial}"


def test_the_second_run_fails_at_once(tmp_path):
    child = holder(tmp_path)
    began = time.monotonic()
    with pytest.raises(LockedError, match=f"in use by process {child.pid} on .*, started 20"):
        RunLock(tmp_path)
    assert time.monotonic() - began < 10.0
    finish(child)


def test_a_killed_run_is_succeeded(tmp_path):
    child = holder(tmp_path)
    child.send_signal(signal.SIGKILL)
    assert finish(child) == -signal.SIGKILL
    with RunLock(tmp_path) as own:
        assert own.reclaimed is not None and own.reclaimed.pid == child.pid
        assert json.loads(own.path.read_text())["pid"] == os.getpid()


def test_a_released_lock_leaves_no_name(tmp_path):
    with RunLock(tmp_path / "new") as own:
        assert own.reclaimed is None
    own.release()
    assert own.path.read_text() == ""
    with RunLock(tmp_path / "new") as again:
        assert again.reclaimed is None


def test_one_process_cannot_lock_twice(tmp_path):
    with RunLock(tmp_path), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path)
    RunLock(tmp_path).release()


def left_by(tmp_path, **changes):
    """A lock file that was never released, as another process left it."""
    owner = lock.this_process()._replace(pid=1, **changes)
    (tmp_path / lock.FILE).write_text(json.dumps(owner._asdict()) + "\n")


def test_the_lock_of_another_machine_is_not_taken_over(tmp_path):
    left_by(tmp_path, host="elsewhere", boot="another")
    with pytest.raises(LockedError, match=r"not released by process 1 on elsewhere.*delete .*run\.lock") as error:
        RunLock(tmp_path)
    assert error.value.exit_code == 73
    (tmp_path / lock.FILE).unlink()
    RunLock(tmp_path).release()


@pytest.mark.parametrize("changes", [{"host": "container"}, {"boot": "an earlier one"}])
def test_another_container_and_an_earlier_boot_are_this_machine(tmp_path, changes):
    if lock.this_process().boot == "":
        changes = {"boot": "an earlier one"}
    left_by(tmp_path, **changes)
    with RunLock(tmp_path) as own:
        assert own.reclaimed is not None and own.reclaimed.pid == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "\x00" * 5000])
def test_a_file_without_a_name_is_a_free_lock(tmp_path, text):
    (tmp_path / lock.FILE).write_text(text)
    with RunLock(tmp_path) as own:
        assert own.reclaimed is None


def test_a_lock_file_deleted_by_hand_is_made_anew(tmp_path):
    child = holder(tmp_path)
    (tmp_path / lock.FILE).unlink()
    with RunLock(tmp_path), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path)
    finish(child)


def test_a_symbolic_link_is_no_lock_file(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / lock.FILE).symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=r"run\.lock"):
        RunLock(tmp_path)
    assert (tmp_path / "target").read_text() == "precious"


def test_a_refused_lock_keeps_no_descriptor(tmp_path):
    left_by(tmp_path, host="elsewhere", boot="another")
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        with pytest.raises(LockedError):
            RunLock(tmp_path)
    assert len(os.listdir("/dev/fd")) == before

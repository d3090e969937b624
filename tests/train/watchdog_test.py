"""The watchdog, with limits of fractions of a second, in processes that load the module by its path, without JAX."""

import subprocess
import sys
import threading
import time

import pytest

from jentropy.train import watchdog
from jentropy.train.watchdog import Watchdog

CHILD = """
import re, runpy, sys, threading, time
module, path, work = sys.argv[1:]

def wait_for_ever():
    threading.Event().wait()

Watchdog = runpy.run_path(module)["Watchdog"]
with Watchdog(path, slow_after=0.2, limit=0.6, interval=0.02) as dog:
    dog.beat("step")
    if work == "hang":
        wait_for_ever()
    elif work == "hold the global lock":
        re.match("(a+)+$", 60 * "a" + "b")
    elif work == "full pipe":
        while True:
            sys.stderr.write(1000 * "x")
"""


def run(tmp_path, work, **options):
    command = [sys.executable, "-I", "-c", CHILD, watchdog.__file__, str(tmp_path / "stacks.txt"), work]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_hang_is_shown_then_ended(tmp_path):
    child = run(tmp_path, "hang")
    _, err = child.communicate(timeout=30)
    assert child.returncode == 77
    text = (tmp_path / "stacks.txt").read_text()
    for found in (err, text):
        assert found.count("watchdog: this step has taken") == 2
        assert "there was none before\n" in found and "there was none before; exit 77\n" in found
        assert found.count("wait_for_ever") == 2
        assert found.count("hread 0x") == 4, "all threads are listed"


def test_code_that_holds_the_global_lock_is_ended_too(tmp_path):
    child = run(tmp_path, "hold the global lock")
    _, err = child.communicate(timeout=30)
    assert child.returncode == 1
    assert "Timeout" in err and "re/__init__.py" in err


def test_a_pipe_that_nobody_reads_is_ended_too(tmp_path):
    child = run(tmp_path, "full pipe")
    assert child.wait(timeout=60) == 77
    assert "exit 77" in (tmp_path / "stacks.txt").read_text()
    child.stderr.close()


def test_a_run_in_time_is_left_alone(tmp_path):
    child = run(tmp_path, "nothing")
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (0, "")
    assert not (tmp_path / "stacks.txt").exists()


def test_slow_is_relative_to_the_median_of_parts_of_one_name(tmp_path, capfd):
    path = tmp_path / "stacks.txt"
    with Watchdog(path, slow_after=0.05, slow_factor=3.0, limit=None, interval=0.01) as dog:
        for _ in range(3):
            dog.beat("save")
            time.sleep(0.2)
        dog.beat("step")
        time.sleep(0.001)
        path.unlink(missing_ok=True)  # the first save was slow in itself
        dog.beat("save")
        time.sleep(0.2)
        assert not path.exists(), "as long as ever"
        dog.beat("step")
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert path.read_text().count("this step has taken") == 1
    assert "1 before took" in path.read_text()
    assert "this step has taken" in capfd.readouterr().err
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_time_in_which_the_process_stood_still_does_not_count(tmp_path):
    dog = Watchdog(tmp_path / "stacks.txt", slow_after=10.0, interval=1.0)
    for _ in range(4):
        dog._look(2.0)
    assert not (tmp_path / "stacks.txt").exists()
    dog._look(3.0)
    assert "this start has taken 11 s" in (tmp_path / "stacks.txt").read_text()
    dog._look(1.0)
    assert (tmp_path / "stacks.txt").read_text().count("has taken") == 1, "once for each part"


def test_a_bad_disk_keeps_nothing_from_standard_error(tmp_path, capfd):
    Watchdog(tmp_path / "absent" / "stacks.txt", slow_after=1.0)._look(2.0)
    assert "this start has taken 2 s" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["slow_after", "slow_factor", "limit", "interval"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_numbers_are_positive(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        Watchdog(tmp_path, **{name: value})

"""SIGTERM and SIGINT in processes of their own, which load the module by its path, without JAX."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from jentropy.train import signals
from jentropy.train.signals import PreemptedError, StopSignals

CHILD = """
import hashlib, runpy, sys, time
module, work = sys.argv[1:]
signals = runpy.run_path(module)
step = 0
try:
    with signals["StopSignals"]() as stop:
        print("ready", flush=True)
        while True:
            if work == "steps":
                time.sleep(0.01)
            else:
                hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000 if work == "long" else 10**9)
            step += 1
            stop.check(step)
except signals["PreemptedError"] as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""
"""Steps are short, or long calls of C code that no signal interrupts, as a compilation is."""


def start(work):
    command = [sys.executable, "-I", "-c", CHILD, signals.__file__, work]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_next_step_boundary(number):
    child = start("steps")
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 75
    assert out.startswith(f"{number.name}: stopped after ")
    assert f"{number.name}: stopping at the next step boundary" in err


def test_a_signal_inside_c_code_is_seen_after_it():
    child = start("long")
    time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out.partition(":")[0]) == (75, "SIGTERM")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once_even_inside_c_code(first):
    child = start("endless")
    child.send_signal(first)
    time.sleep(signals._SAME + 0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = child.communicate(timeout=30)
    assert time.monotonic() - began < 5.0
    assert child.returncode == 128 + signal.SIGTERM
    assert err.count("stopping") == 1


def test_one_request_may_arrive_twice():
    child = start("long")
    for _ in range(5):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    child.communicate(timeout=60)
    assert child.returncode == 75


def test_handlers_are_restored():
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *args: caught.append(args))
    try:
        interrupt = signal.getsignal(signal.SIGINT)
        with StopSignals() as stop:
            assert stop.requested is None
            stop.check(3)
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested == "SIGTERM"
            with pytest.raises(PreemptedError, match="SIGTERM: stopped after 3 rollouts"):
                stop.check(3)
        assert caught == [] and stop.requested == "SIGTERM"
        signal.raise_signal(signal.SIGTERM)
        assert len(caught) == 1
        assert signal.getsignal(signal.SIGINT) is interrupt
        assert signal.set_wakeup_fd(-1) == -1
        assert not any(thread.name == "stop-signals" for thread in threading.enumerate())
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_catches_nothing():
    found = []

    def enter():
        with StopSignals() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(None, before)]

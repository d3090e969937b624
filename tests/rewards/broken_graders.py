"""Graders that are broken in every way, for the tests of worker processes. A row breaks where its text says so."""

import os
import signal
import sys
import time

FLOOD = 1 << 20


def right(prompts, completions, answer, **fields):
    return [float(completion == str(one)) for completion, one in zip(completions, answer)]


def by_text(prompts, completions, **fields):
    """The completion's number; or what its text asks for."""
    return [_one(completion) for completion in completions]


def _one(text):
    if text == "hang":
        time.sleep(60)
    if text == "spin":
        while True:
            pass
    if text == "crash":
        os._exit(3)
    if text == "exit":
        sys.exit(0)
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "print":
        print("x" * FLOOD)
    if text == "error":
        os.write(2, b"x" * FLOOD)
    if text == "raise":
        raise KeyError("no such thing")
    if text == "memory":
        return float(len(bytearray(8 << 30)))
    if text == "abstain":
        return None
    return float(text)


def wrong_length(prompts, completions, **fields):
    return [1.0] * (len(completions) + 1)


def not_a_list(prompts, completions, **fields):
    return 1.0


def wrong_type(prompts, completions, **fields):
    return [0.5 if completion == "0" else "1" for completion in completions]


def not_a_number(prompts, completions, **fields):
    return [float("nan") if completion == "3" else 0.0 for completion in completions]


def infinite(prompts, completions, **fields):
    return [float("-inf")] * len(completions)


def huge(prompts, completions, **fields):
    return [1e39] * len(completions)


def huge_integer(prompts, completions, **fields):
    return [10**400] * len(completions)


def floods_the_channel(prompts, completions, **fields):
    """Writes into every file descriptor it finds, so into the one that its rewards take."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\xff" * 4096)
        except OSError:
            continue
    return [0.0] * len(completions)


def with_a_child(prompts, completions, **fields):
    """Starts a process that lives on, writes its id and hangs."""
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    with open(completions[0], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


def is_fresh(prompts, completions, **fields):
    """Whether the worker has nothing of the run: neither its modules nor its main program."""
    return [float("jax" not in sys.modules and "jentropy" not in sys.modules)] * len(completions)

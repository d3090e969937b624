"""Graders in worker processes: every kind of breakage costs its rows or names the function, and nothing is left."""

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest

from jentropy.rewards import functions, workers
from jentropy.rewards.base import RewardError, RewardTypeError, grade_text

BROKEN = Path(__file__).with_name("broken_graders.py")


@contextlib.contextmanager
def pool(name, **options):
    grader = workers.WorkerGrader(target=f"{BROKEN}:{name}", **{"deadline": 0.5, "max_failed": 1.0} | options)
    found = workers.Pool(grader)
    try:
        yield found
    finally:
        found.close()


def grade(found, completions, **fields):
    return found.grade([""] * len(completions), completions, fields)


def test_rows_keep_their_order_over_many_calls():
    with pool("right", deadline=5.0) as found:
        answers = list(range(300))
        completions = [str(n) if n % 3 else "wrong" for n in answers]
        graded = grade(found, completions, answer=answers)
    np.testing.assert_array_equal(graded.values, [float(n % 3 > 0) for n in answers])
    assert graded.values.dtype == np.float32 and graded.is_valid.all() and not graded.counters


def test_no_rows():
    with pool("right") as found:
        assert len(grade(found, [], answer=[]).values) == 0


@pytest.mark.parametrize(
    "text, kind",
    [
        ("hang", "hang"), ("spin", "hang"), ("crash", "crash"), ("exit", "crash"), ("segfault", "crash"),
        ("print", "flood"), ("error", "flood"), ("raise", "exception"), ("memory", "exception"),
    ],
)  # fmt: skip
def test_a_broken_row_costs_itself(text, kind):
    with pool("by_text") as found:
        graded = grade(found, ["1", "2", text, "4", "abstain", "6"])
        again = grade(found, ["7", "8"])
    np.testing.assert_array_equal(graded.values, np.asarray([1, 2, 0, 4, 0, 6], np.float32))
    np.testing.assert_array_equal(graded.is_valid, [True, True, False, True, False, True])
    assert graded.counters == {kind: 1, "abstained": 1}
    np.testing.assert_array_equal(again.values, np.asarray([7, 8], np.float32))
    assert found.totals == graded.counters


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("wrong_length", RewardError, r"wrong_length' returned 5 values for 4 rows"),
        ("not_a_list", RewardTypeError, r"not_a_list' must return a list, got float"),
        ("wrong_type", RewardTypeError, r"wrong_type' returned str '1' for row 1, not a number or None"),
        ("not_a_number", RewardError, r"not_a_number' returned nan for row 3, not finite in float32"),
        ("infinite", RewardError, r"infinite' returned -inf for row 0"),
        ("huge", RewardError, r"huge' returned 1e\+39 for row 0"),
        ("huge_integer", RewardError, r"huge_integer' returned inf for row 0"),
        ("absent", RewardError, r"absent' cannot be loaded: AttributeError"),
    ],
)
def test_a_broken_function_is_named(name, error, message):
    with pool(name, num_workers=1) as found, pytest.raises(error, match=message):
        grade(found, ["0", "1", "2", "3"])


def test_a_reply_that_is_none_costs_the_rows():
    with pool("floods_the_channel", num_workers=1) as found:
        assert grade(found, ["0", "1"]).counters == {"flood": 2}


def test_too_many_failures_stop():
    with (
        pool("by_text", max_failed=0.5) as found,
        pytest.raises(RewardError, match=r"failed for 2 of 3 rows; the last, row \d: KeyError: 'no such thing'"),
    ):
        grade(found, ["1", "raise", "raise"])


def test_time_is_bounded_by_the_deadlines():
    with pool("by_text", deadline=0.3, num_workers=2) as found:
        began = time.monotonic()
        graded = grade(found, ["hang"] * 4)
        assert graded.counters == {"hang": 4}
        assert time.monotonic() - began < 0.3 * 3 + 3.0  # each worker: one call, then two rows; and six starts


def test_nothing_is_left_running(tmp_path):
    with pool("with_a_child", num_workers=1) as found:
        grade(found, [str(tmp_path / "pid")])
    leader = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline and members(leader):
        time.sleep(0.05)
    assert members(leader) == []


def members(session):
    """Processes of a session that are not dead."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state not in "ZX":
                found.append(int(folder.name))
    return found


def test_a_killed_worker_costs_at_most_a_retry():
    with pool("by_text", num_workers=1) as found:
        grade(found, ["1"])
        found._workers[0]._process.kill()
        graded = grade(found, ["1", "2", "3"])
        assert graded.is_valid.all() and not graded.counters


def test_workers_that_do_not_start(tmp_path):
    (tmp_path / "dies.py").write_text("import os\nos._exit(1)\n")
    found = workers.Pool(workers.WorkerGrader(target=f"{tmp_path / 'dies.py'}:f", num_workers=1))
    with pytest.raises(RewardError, match=r"dies.py:f': its workers do not start \(crash\)"):
        grade(found, ["1"])


def test_a_worker_is_a_fresh_interpreter():
    with pool("is_fresh") as found:
        assert grade(found, ["", ""]).values.tolist() == [1.0, 1.0]


def test_no_descriptor_is_left_open():
    with pool("right", deadline=5.0) as found:
        grade(found, ["1"], answer=[1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pool("right", deadline=5.0) as found:
            grade(found, ["1"], answer=[1])
    assert len(os.listdir("/proc/self/fd")) == before


def test_as_a_text_reward():
    reward = functions.text_reward(f"{BROKEN}:by_text", weight=0.5, deadline=5.0)
    assert (reward.name, reward.weight) == ("by_text", 0.5)
    assert reward == functions.text_reward(f"{BROKEN}:by_text", weight=0.5, deadline=5.0)
    assert hash(reward) == hash(functions.text_reward(f"{BROKEN}:by_text", weight=0.5, deadline=5.0))
    before = workers.counters()
    values, is_valid = grade_text(reward, [""] * 4, ["0.1", "abstain", "raise", "3"], {})
    np.testing.assert_array_equal(values, np.asarray([0.1, 0, 0, 3], np.float32))
    np.testing.assert_array_equal(is_valid, [True, False, False, True])
    after = workers.counters()
    assert {kind: after[kind] - before[kind] for kind in after if after[kind] != before[kind]} == {
        "abstained": 1,
        "exception": 1,
    }
    workers.close_all()


def module_function(prompts, completions, **fields):
    return [1.0] * len(completions)


def test_functions_are_found_by_their_place():
    assert functions.target_of(module_function) == f"{Path(__file__).resolve()}:module_function"
    assert functions.target_of(grade_text) == "jentropy.rewards.base:grade_text"
    assert functions.target_of("a.b:c") == "a.b:c"
    assert grade_text(functions.text_reward(module_function, num_workers=0), [""], [""], {})[0] == 1
    local = functions.text_reward(f"{BROKEN}:by_text", num_workers=0)
    assert grade_text(local, [""], ["7"], {})[0] == 7


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: functions.text_reward(lambda prompts, completions: []), "function must be a function of a module"),
        (lambda: functions.text_reward("nowhere.py:f"), "in a file that exists, got 'nowhere.py:f'"),
        (lambda: functions.text_reward("f"), "path/to/file.py:name or module:name, got 'f'"),
        (lambda: functions.text_reward(module_function, num_workers=-1), "num_workers must be non-negative"),
        (lambda: functions.text_reward(module_function, deadline=0.0), "deadline must be positive and finite, got 0.0"),
        (lambda: functions.text_reward(module_function, memory_mib=1), "memory_mib must be at least 64"),
        (lambda: functions.text_reward(module_function, max_failed=2.0), r"max_failed must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()

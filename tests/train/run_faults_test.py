"""The part of the fault matrix that fits into every run of the tests: whole processes, killed and stopped."""

import concurrent.futures
import importlib.util
import math
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).resolve().parents[2] / "experiments" / "faults"


def load():
    spec = importlib.util.spec_from_file_location("fault_runs", FAULTS / "runs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


faults = load()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return faults.Runs(tmp_path_factory.mktemp("faults"), JAX_DISABLE_MOST_OPTIMIZATIONS="1")


def check(runs, name, trial, number, **settings):
    figures = faults.trials(runs, name, trial, number, seed=1, **settings)
    assert len(figures) == number and not any(map(math.isnan, figures)), figures


@pytest.mark.parametrize(("torn", "number"), [(False, 2), pytest.param(True, 1, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_bytes(runs, torn, number):
    """Each run is killed twice, and resumed."""
    check(runs, f"kill-{torn}", faults.killed, number, kills=2, torn=torn)


SIGNALS = [("update", "save"), pytest.param(("compile", "sample"), marks=pytest.mark.slow)]


@pytest.mark.parametrize("during", SIGNALS, ids=" ".join)
def test_a_signal_commits_a_checkpoint(runs, during):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda fault: check(runs, f"term-{fault}", faults.terminated, 1, fault=fault), during))


def test_of_two_starts_one_survives(runs):
    figures = faults.doubles(runs, 2, seed=1)
    assert figures == [0.0, 0.0]


def test_files_that_cannot_grow(runs):
    check(runs, "full", faults.starved, 1)


def test_a_hang(runs):
    check(runs, "hang", faults.hung, 1)

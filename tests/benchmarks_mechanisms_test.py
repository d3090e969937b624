"""The benchmark of mechanisms: what it measures."""

import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))

import mechanisms as benchmark  # noqa: E402


def test_mechanisms_are_the_ones_that_the_names_say():
    for name, make in benchmark.MECHANISMS.items():
        assert make().update.__module__ == f"jentropy.mechanisms.{name}"
    assert len(benchmark.MECHANISMS) == 13, "the module's docstring says how many"


def test_selection_is_that_of_the_mechanism():
    signals, _ = benchmark.tokens((8, 160))
    mask, entropy = np.asarray(signals.batch.loss_mask), np.asarray(signals.scores["entropy"])
    calls = benchmark.selection_calls((8, 160))
    np.testing.assert_array_equal(calls["jnp.sort"](), np.sort(entropy.ravel()))
    for name in ("top_entropy", "top_entropy, rule quantile"):
        kept = np.asarray(calls[name]().pg_weight) > 0.0
        assert kept.sum() == pytest.approx(0.2 * mask.sum(), abs=1.0)
        assert entropy[kept].min() > entropy[mask & ~kept].max()


def test_variants_take_turns_and_time_is_that_of_the_process():
    order = []
    calls = {"sleep": lambda: (order.append("s"), time.sleep(0.02)), "none": lambda: order.append("n")}
    found = benchmark.medians({k: lambda f=f: (f(), jax.numpy.zeros(()))[1] for k, f in calls.items()}, 2, 3)
    assert "".join(order) == "sn" + 3 * "ssnn"
    assert found["sleep"] < 0.01


def test_ratios_are_to_the_first_of_each_group():
    rows = benchmark.rows_of({"a": 2.0, "b": 4.0, "c": 1.0, "d": 3.0}, 2)
    assert [(row["name"], row["ratio"]) for row in rows] == [("a", 1.0), ("b", 2.0), ("c", 1.0), ("d", 3.0)]

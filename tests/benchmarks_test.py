"""The benchmarks' own arithmetic: what they measure, operations counted token by token, CPU time of this process."""

import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jentropy.policy.transformer import TransformerConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments" / "benchmarks"))

import embedded_throughput as throughput
import ledger
import mechanisms
import timing

CONFIG = TransformerConfig(
    vocab_size=11, width=6, num_layers=3, num_heads=4, num_kv_heads=2, head_size=2, mlp_width=5
)  # fmt: skip


def token(position):
    """Operations of all layers on the token at `position`: projections, MLP, scores and mix over what it sees."""
    weights = 6 * 8 + 2 * 6 * 4 + 8 * 6 + 3 * 6 * 5
    return 3 * (2 * weights + 2 * 2 * 8 * (position + 1))


def test_operations_are_those_of_every_token_that_is_read():
    lengths = throughput.Lengths(np.array([3, 2]), np.array([[1, 4], [2, 2]]))
    prompts = sum(token(t) for length in (3, 2) for t in range(length))
    decoded = sum(token(t) for t in (3, 4, 5, 2, 2))
    head = 2 * 6 * 11 * (1 + 4 + 2 + 2)
    assert throughput.rollout_flops(CONFIG, lengths) == prompts + decoded + head
    rows = sum(token(t) for length in (3, 6, 3, 3) for t in range(length))
    assert throughput.update_flops(CONFIG, lengths, num_epochs=2) == 3 * 2 * (rows + head)


def test_mechanisms_are_the_ones_that_the_names_say():
    for name, make in mechanisms.MECHANISMS.items():
        assert make().update.__module__ == f"jentropy.mechanisms.{name}"
    assert len(mechanisms.MECHANISMS) == 13, "the module's docstring says how many"


def test_selection_is_that_of_the_mechanism():
    signals, _ = mechanisms.tokens((8, 160))
    mask, entropy = np.asarray(signals.batch.loss_mask), np.asarray(signals.scores["entropy"])
    calls = mechanisms.selection_calls((8, 160))
    np.testing.assert_array_equal(calls["jnp.sort"](), np.sort(entropy.ravel()))
    for name in ("top_entropy", "top_entropy, rule quantile"):
        kept = np.asarray(calls[name]().pg_weight) > 0.0
        assert kept.sum() == pytest.approx(0.2 * mask.sum(), abs=1.0)
        assert entropy[kept].min() > entropy[mask & ~kept].max()


def test_variants_take_turns_and_time_is_that_of_the_process():
    order = []
    calls = {"sleep": lambda: (order.append("s"), time.sleep(0.02)), "none": lambda: order.append("n")}
    found = timing.medians({k: lambda f=f: (f(), jax.numpy.zeros(()))[1] for k, f in calls.items()}, 2, 3)
    assert "".join(order) == "sn" + 3 * "ssnn"
    assert found["sleep"] < 0.01


def test_ratios_are_to_the_first_of_each_group():
    rows = mechanisms.rows_of({"a": 2.0, "b": 4.0, "c": 1.0, "d": 3.0}, 2)
    assert [(row["name"], row["ratio"]) for row in rows] == [("a", 1.0), ("b", 2.0), ("c", 1.0), ("d", 3.0)]


def test_rows_of_the_ledger():
    rows = ledger.rows_of(dict(zip(ledger.LEDGERS, (2.0, 2.5, 4.5))))
    assert [row["added"] for row in rows] == pytest.approx([0.0, 0.25, 1.25, 0.35])
    assert [settings and settings.first_order_every for settings in ledger.LEDGERS.values()] == [None, 10**6, 1]


def test_the_program_prints_writes_and_names_a_bad_argument(tmp_path, monkeypatch, capsys):
    path = tmp_path / "table.md"
    for setting in ("enable_compilation_cache", "keep_freed_memory"):
        monkeypatch.setattr(timing, setting, lambda: None)  # of the whole process
    monkeypatch.setattr(sys, "argv", ["timing", "--repeats", "3", "--write", str(path)])
    timing.run("doc", lambda repeats, blocks: f"{repeats} x {blocks}", repeats=1, blocks=2)
    assert capsys.readouterr().out == "3 x 2\n" and path.read_text() == "3 x 2"
    monkeypatch.setattr(sys, "argv", ["timing", "--blocks", "0"])
    with pytest.raises(SystemExit, match="2"):
        timing.run("doc", lambda repeats, blocks: "", repeats=1, blocks=2)
    assert "--blocks must be at least 1, got 0" in capsys.readouterr().err

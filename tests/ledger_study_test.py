"""The study of the ledger and its benchmark: their runs, what they say of known ledgers, what is missing."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from jentropy import config as config_lib
from jentropy.train.ledger import Ledger

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "benchmarks")]
study, run_pool = map(importlib.import_module, ("ledger_study", "run_pool"))


@pytest.fixture(scope="module")
def own_folders(tmp_path_factory):
    with tiny.own_folders(tmp_path_factory.getbasetemp()) as base:
        yield base


def call(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/ledger_study.py", *shlex.split(arguments)])
    return study.main()


def lines(noise):
    """Entries whose measured change is half of Lemma 1's but for noise; first order and covariance are exact."""
    rng = np.random.default_rng(0)
    for step, lemma in enumerate(rng.normal(-0.01, 0.01, 40)):
        measured = 0.5 * lemma + noise * rng.normal()
        line = {"step": step, "ledger/lemma1": lemma, "ledger/entropy_change": measured}
        line |= {"ledger/covariance": -100.0 * measured, "ledger/response_covariance": 1.0}
        yield line | ({"ledger/first_order": measured} if step % 10 == 0 else {})


@pytest.fixture
def trained(monkeypatch):
    """Runs of which the second has a noisy ledger."""

    def train(config, out, *, resume, allow_change, quiet):
        out.mkdir(parents=True, exist_ok=True)
        config_lib.write_lines(out / "config.txt", config_lib.flatten(config))
        noise = 0.02 if "-w1-" in config.name else 0.0
        (out / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(noise)))
        (out / "metrics.jsonl").write_text(json.dumps({"step": 40, "final": True}) + "\n")

    monkeypatch.setattr(run_pool, "train", train)


def test_the_runs_are_those_of_the_config_on_five_warm_starts(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(
        study, "run_and_write", lambda args, tasks, written: found.update({t.config.name: t for t in tasks})
    )
    call(f"--out {tmp_path}", monkeypatch)
    assert list(found) == [f"law_ledger-w{warm}-s0" for warm in range(5)]
    built = config_lib.build(found["law_ledger-w3-s0"].config)
    assert built.stages[1].ledger == Ledger(every=1, first_order_every=10)
    assert (built.stages[0].seed, built.stages[1].steps, built.seed) == (3, 100, 0)
    law = config_lib.flatten(config_lib.load_config(study.CONFIGS / "law_grpo.py"))
    own = config_lib.flatten(config_lib.load_config(study.CONFIGS / "law_ledger.py"))
    assert {line.partition(" = ")[0] for line in set(law) ^ set(own)} == {
        "name", "stages.1.ledger", "stages.1.ledger.every", "stages.1.ledger.first_order_every",
    }  # fmt: skip


def test_the_table_says_what_the_ledgers_say(trained, tmp_path, monkeypatch, capsys):
    assert call(f"--out {tmp_path} --warm-starts 0 1 --jobs 1 --write {tmp_path}/ledger.md", monkeypatch) == 0
    text = (tmp_path / "ledger.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert f"`python experiments/ledger_study.py --out {tmp_path} --warm-starts 0 1" in text
    assert "is at least 0.98 in 1 of 2 runs; the least is 0." in text
    good, noisy = (line for line in text.splitlines() if line.startswith("| law_ledger"))
    assert "1.0000, 0.5 (40)" in good and "1.0000, 1 (4)" in good and "1.0000, 0.01 (40)" in good
    assert "1.0000, 0.5 (40)" not in noisy and "–" in noisy  # the covariance of responses does not vary
    assert (tmp_path / "law_ledger-w1-s0" / "ledger.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    assert call(f"--out {tmp_path} --warm-starts 0 --no-run", monkeypatch) == 0
    text = capsys.readouterr().out
    assert "No run has finished." in text and "`law_ledger-w0-s0`: not made, or not finished" in text


def test_a_small_run_from_end_to_end(own_folders, tmp_path, monkeypatch, capsys):
    assert call(f"--out {tmp_path} --warm-starts 0 --jobs 1 --smoke", monkeypatch) == 0
    assert "| law_ledger-w0-s0" in capsys.readouterr().out
    assert (tmp_path / "law_ledger-w0-s0" / "ledger.jsonl").exists()

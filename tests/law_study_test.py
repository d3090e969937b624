"""The study of the law: its runs, what it says of known laws, ledgers, failures, and one real run."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from jentropy import config as config_lib
from jentropy.train.quarantine import NumericError

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
law_study, law_tables, run_pool = map(importlib.import_module, ("law_study", "law_tables", "run_pool"))


def call(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/law_study.py", *shlex.split(arguments)])
    return law_study.main()


def ledger_lines(seed, noise):
    """A ledger in which Lemma 1 is off by `noise` and the first order is half of what was measured."""
    change = np.random.default_rng(seed).normal(-0.01, 0.01, 30)
    for step, value in enumerate(change):
        line = {"step": step, "stage": "law", "ledger/entropy_change": value, "ledger/lemma1": value + noise * step % 3}
        yield line | ({"ledger/first_order": 0.5 * value} if step % 10 == 0 else {})


@pytest.fixture
def trained(monkeypatch):
    """Runs that follow a law whose a grows with the MLP and with REINFORCE++; an exception by name ends one."""
    calls, errors, options = [], {}, {"ledger": True}

    def train(config, out, *, resume, allow_change, quiet):
        calls.append(config.name)
        out.mkdir(parents=True, exist_ok=True)
        config_lib.write_lines(out / "config.txt", config_lib.flatten(config))
        if config.name in errors:
            raise errors[config.name]
        noise = np.random.default_rng(config.seed)
        log_size = np.log(law_study.num_parameters(config_lib.build(config.policy)))
        a = 0.2 + 0.03 * log_size + (0.1 if "reinforce_pp" in config.name else 0.0) + 0.002 * noise.standard_normal()
        entropy = 0.03 + 0.72 * np.exp(-np.linspace(0, 4, 21))
        reward = 0.98 + a - a * np.exp(entropy) + 0.001 * noise.standard_normal(21)
        lines = [
            {"step": 2 * i, "stage": "law", "val/entropy": h, "val/reward/mean@8": r}
            for i, (h, r) in enumerate(zip(entropy, reward))
        ]
        lines[-1]["final"] = True
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if options["ledger"]:
            text = "".join(json.dumps(line) + "\n" for line in ledger_lines(config.seed, 0.0))
            (out / "ledger.jsonl").write_text(text)

    monkeypatch.setattr(run_pool, "train", train)
    train.calls, train.errors, train.options = calls, errors, options
    return train


def rows_of(text, heading):
    """The cells of the table after a heading, without its first two lines."""
    part = text[text.index(heading) :].split("\n\n")[1]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()[2:]]


def test_known_laws_are_found_and_compared(trained, tmp_path, monkeypatch, capsys):
    assert call(f"--smoke --jobs 1 --seeds 0 1 2 --out {tmp_path}/runs --write {tmp_path}/law.md", monkeypatch) == 0
    text = capsys.readouterr().out
    assert len(trained.calls) == 27 and text.startswith((tmp_path / "law.md").read_text().rstrip())
    verdicts = {row[0]: row[1:] for row in rows_of(text, "## Beside the paper")}
    paper, here, verdict = verdicts["a and b under another algorithm"]
    assert (paper, verdict) == ("the same", "does not reproduce")
    assert here.startswith("6 of 12 differences not 0, largest +") and "REINFORCE++, a" in here
    assert verdicts["entropy spent at 1/12 of the steps"][0] == "73%"
    assert verdicts["entropy spent at 1/12 of the steps"][2] == "less here"  # 1 - exp(-1/3) of it: 29 %
    assert verdicts["RMSE of the forecast from the first 15%"][2] == "reproduces"
    assert verdicts["a of the largest policy from ln N of the others"][2] == "reproduces"
    sizes = rows_of(text, "## Size of the policy")
    assert sizes[0][0] == "a" and float(sizes[0][2]) == pytest.approx(0.03, abs=0.01)
    ledger = rows_of(text, "## Predicted and measured change")
    assert len(ledger) == 18 and ledger[0][2:] == ["Lemma 1", "3", "90", "1.000", "1.000", "0.0%"]
    assert ledger[1][2:] == ["First order in parameters", "3", "9", "1.000", "1.000", "50.0%"]
    assert len(rows_of(text, "## Each run")) == 27
    said = " ".join(text.split())
    assert "27 of 27 runs have a law, with an R² of 1.000" in said and "at least 1.000; 27 of them reach .98." in said


def test_a_second_call_makes_no_run(trained, tmp_path, monkeypatch, capsys):
    arguments = f"--smoke --jobs 1 --sizes 0.1M --estimators grpo --seeds 0 1 --out {tmp_path}"
    texts = []
    for _ in range(2):
        assert call(arguments, monkeypatch) == 0
        texts.append(capsys.readouterr().out)
        assert len(trained.calls) == 2
    assert texts[0] == texts[1]
    assert "Fewer than two sizes have a law: there is no line in ln N." in texts[0]
    row = rows_of(texts[0], "## Beside the paper")[0]
    assert row[2:] == ["no two estimators with at least two runs each", "not tested"]


def test_failed_runs_are_named_and_in_no_table(trained, tmp_path, monkeypatch, capsys):
    trained.options["ledger"] = False
    trained.errors["law_0.1M_rloo-w1-s1"] = NumericError("the last 4 rollouts had updates skipped")
    arguments = f"--smoke --jobs 1 --sizes 0.1M 0.3M --estimators grpo rloo --seeds 0 1 2 --out {tmp_path}"
    assert call(arguments, monkeypatch) == 0
    text = capsys.readouterr().out
    assert "- `law_0.1M_rloo-w1-s1`: NumericError: the last 4 rollouts had updates skipped" in text
    assert len(rows_of(text, "## Each run")) == 11
    assert [row[3] for row in rows_of(text, "## a and b by size and estimator")] == ["3", "2", "3", "3"]
    assert "No run has a `ledger.jsonl` with these predictions." in text
    assert "Two sizes fit any line exactly: there is no error to give." in text


def test_nothing_finished_is_said(tmp_path, monkeypatch, capsys):
    assert call(f"--smoke --no-run --sizes 0.1M --estimators grpo --seeds 0 --out {tmp_path}", monkeypatch) == 0
    text = capsys.readouterr().out
    assert "No run has finished." in text and "`law_0.1M_grpo-w0-s0`: not made, or not finished" in text


def test_the_runs_are_those_of_law_in_three_sizes(tmp_path, monkeypatch):
    found = {}

    def run_and_write(args, tasks, written):
        found.update({task.config.name: task for task in tasks})
        return 0

    monkeypatch.setattr(law_study, "run_and_write", run_and_write)
    assert call(f"--out {tmp_path} --seeds 0 4", monkeypatch) == 0
    assert len(found) == 3 * 3 * 2 and len({task.program for task in found.values()}) == 9
    task = found["law_0.1M_rloo-w4-s4"]
    law = config_lib.load_config(law_study.CONFIGS / "law_rloo.py")
    changed = {line.partition(" = ")[0] for line in set(config_lib.flatten(task.config)) ^ set(config_lib.flatten(law))}
    assert {path for path in changed if not path.startswith("stages.1.ledger")} == {
        "name", "seed", "stages.0.seed", "evaluation.every",
    }  # fmt: skip
    sizes = [config_lib.build(found[f"law_{size}_grpo-w0-s0"].config).policy for size in law_study.SIZES]
    np.testing.assert_allclose([law_study.num_parameters(each) for each in sizes], [1e5, 3e5, 1e6], rtol=0.06)


def test_a_ledger_agrees_by_hand(tmp_path):
    path = tmp_path / "ledger.jsonl"
    measured, predicted = [-1.0, 0.0, 1.0, 2.0], [-1.0, 0.5, 1.0, 1.5]
    lines = [
        {"step": i, "ledger/entropy_change": m, "ledger/lemma1": p} for i, (m, p) in enumerate(zip(measured, predicted))
    ]
    lines += [
        {"step": 4, "ledger/entropy_change": 1.0},
        {"step": 5, "ledger/entropy_change": 1.0, "ledger/lemma1": "nan"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = law_tables.agreement(path)
    assert set(found) == {"lemma1"}
    np.testing.assert_allclose(found["lemma1"], [4, 4 / np.sqrt(5 * 3.5), np.sqrt(0.125 / 1.5)])
    assert law_tables.agreement(tmp_path / "missing.jsonl") == {}


def test_a_real_run_of_the_smallest_kind(tmp_path, monkeypatch, tmp_path_factory, capsys):
    with tiny.own_folders(tmp_path_factory.getbasetemp()):
        arguments = f"--smoke --jobs 1 --sizes 0.1M --estimators grpo --seeds 0 --out {tmp_path}"
        assert call(arguments, monkeypatch) == 0
    assert len(rows_of(capsys.readouterr().out, "## Each run")) == 1
    entries = [
        json.loads(line) for line in (tmp_path / "law_0.1M_grpo-w0-s0" / "ledger.jsonl").read_text().splitlines()
    ]
    assert len(entries) == 4 and all({"ledger/lemma1", "ledger/entropy_change"} <= set(line) for line in entries)


def test_runs_of_one_start_count_once():
    pairs = [(0, 0), (0, 0), (1, 1), (0, 0)]
    runs = [law_tables.Run(size, "grpo", pair, 1, {}, (), {}, {}) for size, pair in zip("aaab", pairs)]
    assert law_tables.over_starts(runs, [1.0, 3.0, 5.0, 7.0]) == [2.0, 5.0, 7.0]

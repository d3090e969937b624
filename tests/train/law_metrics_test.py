"""The law along a run: its numbers, when there are none, and equal bytes after a resumption."""

import numpy as np
import pytest
import tiny

from jentropy import config as config_lib
from jentropy.theory.law import bootstrap_intervals, fit_law
from jentropy.train import loop
from jentropy.train.law_metrics import MIN_EVALUATIONS, LawMetrics, law_metrics
from jentropy.train.metrics import read_metrics

KEYS = {"law/ceiling", "law/fraction_of_ceiling"}
KEYS |= {f"{key}/{end}" for key in KEYS for end in ("low", "high")}

ENTROPY = [0.8, 0.5, 0.32, 0.2, 0.1, 0.06]
REWARD = [0.38, 0.67, 0.8, 0.85, 0.95, 0.93]


def lines_of(entropy, reward, stage="one"):
    return [
        {"step": step, "stage": stage, "val/entropy": h, "val/reward/mean@4": r}
        for step, (h, r) in enumerate(zip(entropy, reward))
    ]


def test_the_numbers_are_those_of_the_fit():
    found = law_metrics(lines_of(ENTROPY, REWARD))
    assert set(found) == KEYS
    ceiling = fit_law(ENTROPY, REWARD).ceiling
    low, high = bootstrap_intervals(ENTROPY, REWARD, 0, num_resamples=400).ceiling
    assert low < ceiling < high
    expected = {"": (ceiling, 0.93 / ceiling), "/low": (low, 0.93 / high), "/high": (high, 0.93 / low)}
    for end, (value, fraction) in expected.items():
        np.testing.assert_allclose(found[f"law/ceiling{end}"], value, rtol=1e-12)
        np.testing.assert_allclose(found[f"law/fraction_of_ceiling{end}"], fraction, rtol=1e-12)


def test_the_law_appears_with_the_fourth_evaluation_of_a_stage():
    law = LawMetrics()
    lines = [*lines_of(ENTROPY, REWARD), *lines_of(ENTROPY[:5], REWARD[:5], "two")]
    written = [law(line["step"], line) for line in lines]
    assert [KEYS <= set(line) for line in written] == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 2
    assert MIN_EVALUATIONS == 4
    for line, found in zip(lines, written):
        assert {name: value for name, value in found.items() if name not in KEYS} == line
    assert written[4] == {**lines[4], **law_metrics(lines[:5])}
    assert written[-1]["law/ceiling"] == written[4]["law/ceiling"]


@pytest.mark.parametrize(
    "entropy,reward",
    [
        (ENTROPY[:3], REWARD[:3]),
        ([0.5] * 5, REWARD[:5]),
        (ENTROPY[::-1], REWARD),
        (ENTROPY, REWARD[::-1]),
        (ENTROPY, [0.0] * 6),
        ([np.nan] * 6, REWARD),
        ([0.5, 0.5, 0.5, 0.5, 0.4], REWARD[:5]),
    ],
)
def test_where_the_law_says_nothing_nothing_is_written(entropy, reward):
    assert law_metrics(lines_of(entropy, reward)) == {}
    assert law_metrics([]) == {}


def test_there_is_no_fraction_of_a_ceiling_that_is_not_positive():
    reward = [-0.9, -0.6, -0.42, -0.3, -0.2, -0.15]
    found = law_metrics(lines_of(ENTROPY, reward))
    assert found["law/ceiling"] < 0 and set(found) == {"law/ceiling", "law/ceiling/low", "law/ceiling/high"}


@pytest.mark.usefixtures("own_folders")
def test_a_resumed_run_writes_the_law_of_an_uninterrupted_one(tmp_path, monkeypatch):
    real = loop.Evaluator.__call__

    def evaluate(self, params, key, step, *, greedy=False):
        numbers = {"val/entropy": ENTROPY[step], "val/reward/mean@4": REWARD[step]}
        return {**real(self, params, key, step, greedy=greedy), **numbers}

    monkeypatch.setattr(loop.Evaluator, "__call__", evaluate)
    config = config_lib.apply_overrides(tiny.tiny(), ["evaluation.every=1"])
    config.stages = config.stages[:2]
    final = loop.train(config, tmp_path / "whole", quiet=True)
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert final == lines[-1] and final["step"] == tiny.BEFORE
    assert {line["step"] for line in lines if "val/entropy" in line and KEYS <= set(line)} == {3, 4, 5}
    assert not any(KEYS & set(line) for line in lines if "actor/entropy" in line)
    tiny.train_until(4, config, tmp_path / "stopped")  # the checkpoint is at 3
    assert loop.train(config, tmp_path / "stopped", resume=True, quiet=True) == final
    whole, stopped = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped

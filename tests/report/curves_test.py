"""Runs as groups and curves, from files written by hand."""

import json

import numpy as np
import pytest

from jentropy.report.comparison import interval
from jentropy.report.curves import band, curve, differing, group_runs, points, read_runs, spread
from jentropy.report.plots import smooth

CONFIG = {
    ".": "jentropy.train.experiment.Experiment(...)",
    "name": "'law_grpo'",
    "seed": "0",
    "stages.0": "jentropy.train.experiment.Supervised(...)",
    "stages.0.steps": "600",
    "stages.0.seed": "0",
    "stages.1": "jentropy.train.experiment.Reinforce(...)",
    "stages.1.steps": "3",
    "stages.1.optimizer.learning_rate": "0.0002",
}


@pytest.fixture
def write(tmp_path):
    """Writes a run's folder from lines and from changes of `CONFIG`; None for no config."""

    def write(folder, lines, changes=(), config=CONFIG):
        path = tmp_path / folder
        path.mkdir(parents=True)
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if config is not None:
            text = "".join(f"{key} = {value}\n" for key, value in {**config, **dict(changes)}.items())
            (path / "config.txt").write_text(text)
        return path

    return write


def steps(*values, key="actor/entropy"):
    return [{"step": i, "stage": "rl", key: value} for i, value in enumerate(values)]


def test_runs_that_differ_in_seeds_and_name_are_one_group(write):
    paths = [
        write("a", steps(1.0), {"name": "'law_grpo-w0-s0'"}),
        write("b", steps(1.0), {"name": "'law_grpo-w0-s1'", "seed": "1"}),
        write("c", steps(1.0), {"name": "'law_grpo-w1-s10'", "seed": "10", "stages.0.seed": "1"}),
        write("d", steps(1.0), {"stages.1.optimizer.learning_rate": "0.1", "name": "'law_grpo'"}),
        write("e", steps(1.0), {"stages.0.steps": "1"}),
    ]
    groups = group_runs(read_runs(paths))
    assert [(g.label, [r.folder for r in g.runs], g.style) for g in groups] == [
        ("law_grpo", ["a", "b", "c"], 0),
        ("law_grpo (2)", ["d"], 1),
        ("law_grpo (3)", ["e"], 2),
    ]
    assert differing(groups) == [
        {"field": "stages.0.steps", "0": "600", "1": "600", "2": "1"},
        {"field": "stages.1.optimizer.learning_rate", "0": "0.0002", "1": "0.1", "2": "0.0002"},
    ]


def test_a_field_that_only_one_group_has(write):
    groups = group_runs(read_runs([write("a", []), write("b", [], {"stages.1.ledger": "None"})]))
    assert differing(groups) == [{"field": "stages.1.ledger", "0": None, "1": "None"}]


def test_a_run_without_config_stands_alone(write):
    paths = [write("a", steps(1.0), config=None), write("b", steps(1.0), config=None)]
    groups = group_runs(read_runs(paths))
    assert [group.label for group in groups] == ["a", "b"]
    assert "no config.txt: it stands alone, without seed and config" in groups[0].runs[0].notes


def test_folders_are_told_apart_and_count_once(write):
    paths = [write("x/s0", []), write("y/s0", []), write("y/s1", [])]
    assert [run.folder for run in read_runs([*paths, paths[0] / ".." / "s0"])] == ["x/s0", "y/s0", "s1"]


def test_what_is_wrong_with_a_run_is_noted(write):
    path = write("a", [*steps(1.0, 0.9), {"loss": 1.0}])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"actor/entr')
    run = read_runs([path])[0]
    assert run.notes == (
        "metrics.jsonl: the last line was torn and is left out",
        "1 lines without a step are left out",
        "not finished: 2 of 3 rollouts",
        "no evaluation",
    )
    assert (run.rollouts, run.planned, run.finished) == (2, 3, False)


def test_a_finished_run_has_no_notes(write):
    run = read_runs([write("a", [*steps(1.0, 0.9, 0.8), {"step": 3, "final": True, "val/entropy": 0.7}])])[0]
    assert (run.notes, run.rollouts, run.finished, run.ledger) == ((), 3, True, None)


@pytest.mark.parametrize("content", [b"", b'{"step": 0}\n'])
def test_a_whole_file_is_not_torn(write, content):
    path = write("a", [])
    (path / "metrics.jsonl").write_bytes(content)
    assert not any("torn" in note for note in read_runs([path])[0].notes)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is no run: it has neither metrics.jsonl nor config.txt"):
        read_runs([tmp_path])


def test_a_damaged_line_is_named(write):
    path = write("a", steps(1.0))
    (path / "metrics.jsonl").write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not a JSON object"):
        read_runs([path])


def test_bands_are_intervals_ranges_or_nothing():
    nan = np.nan
    values = np.array([[1.0, 1.0, nan, 5.0], [2.0, nan, nan, nan], [6.0, 4.0, nan, nan]])
    mean, low, high = band(values)
    np.testing.assert_allclose(mean, [3.0, 2.5, nan, 5.0])
    np.testing.assert_allclose([low[1:], high[1:]], [[1.0, nan, nan], [4.0, nan, nan]])
    rng = np.random.default_rng(0)
    means = values[:, 0][rng.integers(0, 3, (2000, 3))].mean(axis=1)
    np.testing.assert_allclose([low[0], high[0]], np.quantile(means, [0.025, 0.975]))


def test_figures_have_the_same_three_forms():
    assert spread([]) is None
    assert spread([-0.5]) == "\u22120.500"
    assert spread([1.0, 0.0]) == "0.500 (0.000 to 1.000)"
    mean, low, high = interval([0.1, 0.2, 0.6])
    assert spread([0.1, 0.2, 0.6]) == f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def test_a_curve_is_the_mean_of_smoothed_runs_and_breaks_between_stages():
    def lines(offset):
        return [{"step": i, "stage": "ab"[i >= 10], "k": float(i % 3) + offset} for i in range(20)]

    found = curve("x", 2, [lines(0.0), lines(1.0)], "k", smoothed=True)
    y = np.array([float(i % 3) for i in range(20)])
    expected = np.concatenate([smooth(y[:10]), [np.nan], smooth(y[10:])]) + 0.5
    np.testing.assert_allclose(found.y, expected)
    np.testing.assert_allclose(found.low, expected - 0.5)
    assert found.style == 2 and found.low.size == found.x.size == 21
    assert curve("x", 0, [lines(0.0)], "k").low is None
    assert curve("x", 0, [lines(0.0)], "other") is None and curve("x", 0, [], "k") is None


def test_a_run_that_ended_early_leaves_the_rest_to_the_others():
    found = curve("x", 0, [steps(1.0, 1.0), steps(3.0, 3.0, 3.0)], "actor/entropy")
    assert found.y.tolist() == [2.0, 2.0, 3.0] and np.isnan(found.low).tolist() == [False, False, True]


def test_long_curves_are_thinned_to_means():
    found = curve("x", 0, [steps(*np.arange(1000.0))], "actor/entropy", marks=True)
    assert found.x.size == 200 and found.y[0] == 2.0 and found.x[-1] == 997.0 and not found.marks


def test_points_are_finite_and_in_order():
    lines = [{"step": 2, "k": 1.0}, {"step": 1, "k": float("nan")}, {"step": 0, "k": 3}, {"step": 1, "k": "x"}]
    x, y = points(lines, "k")
    assert (x.tolist(), y.tolist()) == ([0.0, 2.0], [3.0, 1.0])

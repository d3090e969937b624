"""`jentropy fit` as a user calls it: tables, files, what it says where there is no law, and what it refuses."""

import json
import os

import numpy as np
import pytest

from jentropy import cli
from jentropy.report.fit import fit_curves, read_curves
from jentropy.theory.law import bootstrap_intervals, fit_law, forecast

A, B = 0.5, 1.48
CONFIG = "name = 'x'\npolicy.width = 64\ntask.data_dir = None\nstages.1.mixture.2 = 0.2\nstages.1.steps = 100\n"


def points_of(seed, num_points=21, noise=0.01):
    """Entropies and rewards of a run, every five steps."""
    entropy = 0.03 + 0.72 * np.exp(-np.linspace(0, 4, num_points))
    return entropy, B - A * np.exp(entropy) + noise * np.random.default_rng(seed).standard_normal(num_points)


def write_run(folder, *stages, config=CONFIG):
    """A run with the entropies and rewards of each stage, named `one`, `two`, ..."""
    folder.mkdir()
    lines, step = [], 0
    for name, (entropy, reward) in zip(("one", "two"), stages):
        for h, r in zip(entropy, reward):
            lines.append({"step": step, "stage": name, "actor/entropy": 1.1 * h})
            lines.append({"step": step, "stage": name, "val/entropy": h, "val/reward/mean@8": r, "val/pass@8": 1.0})
            step += 5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.txt").write_text(config)
    return folder


def run_fit(capsys, *argv):
    """What `jentropy fit` prints."""
    assert cli.main(["fit", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def cells_of(text, first):
    """The cells of the rows that begin with `first`, of all tables."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row[1:] for row in rows if row[0] == first]


def refused(capsys, *argv):
    assert cli.main(["fit", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("jentropy: ") and captured.err.count("\n") == 1
    return captured.err


def test_one_run_is_fitted_in_its_folder(tmp_path, capsys):
    entropy, reward = points_of(0)
    run = write_run(tmp_path / "law", (entropy, reward))
    text = run_fit(capsys, run)
    law, (a, b, ceiling) = fit_law(entropy, reward), bootstrap_intervals(entropy, reward, 0)
    cells, more = cells_of(text, "law")
    assert cells[:3] == [
        "21",
        f"{law.a:.3f} ± {law.a_stderr:.3f} [{a.low:.3f}, {a.high:.3f}]",
        f"{law.b:.3f} ± {law.b_stderr:.3f} [{b.low:.3f}, {b.high:.3f}]",
    ]
    assert cells[4:] == [f"{law.r_squared:.3f}", f"{law.rmse:.4f}"]
    ahead = [forecast(entropy, reward, fraction=fraction) for fraction in (0.15, 0.2, 0.3)]
    assert more[:3] == [f"{each.rmse:.4f}, {each.covered:.0%} in" for each in ahead]
    spent = (entropy[0] - np.interp(100 / 12, [5, 10], entropy[1:3])) / np.ptp(entropy)
    assert more[3].startswith(f"{spent:.0%} / ")
    assert f"Picture: {run / 'law.png'}\nNumbers: {run / 'law.json'}" in text
    assert (run / "law.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((run / "law.json").read_text())
    assert found["until"] is None and found["together"] == []
    (curve,) = found["curves"]
    assert (curve["stage"], curve["points"], curve["run"]) == ("one", 21, str(run))
    assert curve["law"]["ceiling"] == {
        "value": law.ceiling, "stderr": law.ceiling_stderr, "interval": [ceiling.low, ceiling.high],
    }  # fmt: skip
    assert [each["num_fitted"] for each in curve["forecasts"]] == [3, 4, 6]


def test_several_runs_are_fitted_together(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    points = [points_of(seed) for seed in range(3)]
    runs = [write_run(tmp_path / f"run{seed}", each) for seed, each in enumerate(points)]
    text = run_fit(capsys, *runs, runs[0])
    fits = [fit_law(*each) for each in points]
    mean, spread = np.mean([fit.a for fit in fits]), np.std([fit.a for fit in fits], ddof=1) / np.sqrt(3)
    low, high = mean - 2.91998558 * spread, mean + 2.91998558 * spread
    cells, _ = cells_of(text, "mean of 3")
    assert cells[:2] == ["63", f"{mean:.3f} ± {spread:.3f} [{low:.3f}, {high:.3f}]"]
    pooled = fit_law(*(np.concatenate(each) for each in zip(*points)))
    assert cells[4:] == [f"{pooled.r_squared:.3f}", f"{pooled.rmse:.4f}"]
    assert f"Numbers: {os.path.join('runs', 'fit', 'law.json')}" in text
    found = json.loads((tmp_path / "runs/fit/law.json").read_text())
    assert len(found["curves"]) == 3 and found["together"][0]["runs"] == ["run0", "run1", "run2"]
    rmse = np.mean([forecast(*each, fraction=0.3).rmse for each in points])
    assert found["together"][0]["forecasts"][2]["rmse"] == pytest.approx(rmse)


def test_only_runs_of_one_policy_data_and_stage_are_put_together(tmp_path):
    other = CONFIG.replace("width = 64", "width = 32")
    moved = CONFIG.replace("data_dir = None", "data_dir = 'here'").replace("steps = 100", "steps = 50")
    configs = {"a": CONFIG, "b": moved, "c": other, "d": CONFIG.replace("2 = 0.2", "2 = 0.3")}
    runs = [write_run(tmp_path / name, points_of(i), config=text) for i, (name, text) in enumerate(configs.items())]
    (together,) = fit_curves(read_curves(runs))["together"]
    assert together["runs"] == ["a", "b"]


def test_stages_are_fitted_apart(tmp_path, capsys):
    flat = (np.linspace(0.6, 0.3, 9), np.linspace(0.3, 0.2, 9))
    runs = [write_run(tmp_path / name, points_of(seed), flat) for seed, name in enumerate("ab")]
    text = run_fit(capsys, *runs, "--out", tmp_path / "out")
    assert cells_of(text, "a, one")[0][0] == "21" and cells_of(text, "mean of 2, one")[0][0] == "42"
    assert cells_of(text, "a, two") == [["9", *["–"] * 5], ["–"] * 5]
    assert "a, two; b, two: no law: reward did not rise as entropy fell (a <= 0)" in text
    assert "mean of 2, two" not in text and "mean of 0" not in text


def test_until_hides_what_comes_later(tmp_path, capsys):
    entropy, reward = points_of(0)
    reward[10:] -= 0.05
    run = write_run(tmp_path / "law", (entropy, reward))
    text = run_fit(capsys, run, "--until", 49)
    ahead = forecast(entropy, reward, num_fitted=10)
    assert cells_of(text, "law")[0][0] == "10" and "of the evaluations up to step 49" in text
    assert cells_of(text, "law")[1][0] == f"{ahead.rmse:.4f}, {ahead.covered:.0%} in"
    (curve,) = json.loads((run / "law.json").read_text())["curves"]
    assert curve["law"]["a"]["value"] == fit_law(entropy[:10], reward[:10]).a
    (numbers,) = curve["forecasts"]
    assert numbers["until"] == 49 and numbers["num_predicted"] == 11 and numbers["bias"] > 0.03
    assert "no forecast, steps <= 100: all 21 points are fitted" in run_fit(capsys, run, "--until", 100)


RISING = (np.linspace(0.2, 0.8, 9), np.linspace(0.2, 0.8, 9))


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (RISING, "entropy rises over the run: none was spent"),
        ((np.full(9, 0.5), RISING[1]), "entropy does not vary: all 9 points lie at 0.5 nats"),
        ((RISING[0][::-1], RISING[1][::-1]), "reward did not rise as entropy fell (a <= 0)"),
        (([0.5, 0.4], [0.1, 0.2]), "the law needs at least 3 points, got 2"),
        (([0.5, 0.5, 0.5, 0.4], [0.1, 0.2, 0.15, 0.3]), "the law hangs on one point, at 0.4 nats"),
        (([], []), "no evaluation with a held-out reward and an entropy"),
    ],
)
def test_a_run_without_a_law_has_a_reason_and_no_number(tmp_path, capsys, points, said):
    run = write_run(tmp_path / "law", points)
    text = run_fit(capsys, run)
    assert f"law: no law: {said}" in text
    assert cells_of(text, "law") == [[str(len(points[0])), *["–"] * 5], ["–"] * 5]
    (curve,) = json.loads((run / "law.json").read_text())["curves"]
    assert said in curve["law"]["why"] and set(curve["law"]) == {"why"}
    assert all("rmse" not in each for each in curve["forecasts"]) and set(curve["consumption"]) == {"why"}
    assert (run / "law.png").exists()


def test_reasons_are_said_once(tmp_path, capsys):
    runs = [write_run(tmp_path / f"run{i}", RISING) for i in range(5)]
    text = run_fit(capsys, *runs, "--out", tmp_path / "out")
    assert "run0; run1; run2 and 2 more: no law: entropy rises" in text and text.count("no law") == 1


def test_runs_of_one_name_are_told_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    runs = [write_run(tmp_path / folder / "law", points_of(0)) for folder in ("x", "y")]
    assert [curve.name for curve in read_curves(runs)] == [str(run) for run in runs]


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert f"{tmp_path} holds no run: no metrics.jsonl" in refused(capsys, tmp_path)
    assert "missing holds no run" in refused(capsys, write_run(tmp_path / "law", points_of(0)), tmp_path / "missing")
    with (tmp_path / "law" / "metrics.jsonl").open("r+") as file:
        file.write("damaged")
    assert "metrics.jsonl, line 1: not a JSON object" in refused(capsys, tmp_path / "law")
    assert not (tmp_path / "law" / "law.json").exists()


@pytest.mark.parametrize("argv", [[], ["run", "--until", "late"]])
def test_bad_arguments_are_refused_with_a_usage(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *argv])
    assert stop.value.code == 2 and "usage: jentropy fit" in capsys.readouterr().err


def test_equal_runs_write_equal_numbers(tmp_path, capsys):
    run = write_run(tmp_path / "law", points_of(0))
    said = [(run_fit(capsys, run), (run / "law.json").read_bytes()) for _ in range(2)]
    assert said[0] == said[1]

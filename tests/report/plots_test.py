"""Plots: what they show, and that odd runs still give a picture that says what is missing."""

import warnings

import numpy as np
import pytest

from jentropy.report import plots
from jentropy.report.plots import comparison_plot, law_points, run_plot, smooth, stage_boundaries


def run(num_steps=41, every=5, stage=lambda step: "rl", a=0.5, b=1.48):
    """Lines of a run that follows the law exactly."""
    lines = []
    for step in range(num_steps):
        entropy = 0.02 + 0.78 * np.exp(-step / 14)
        line = {"step": step, "stage": stage(step), "actor/entropy": entropy, "actor/pg_clipfrac": 0.05 / (1 + step)}
        if step % every == 0:
            line |= {"val/entropy": entropy, "val/reward/mean@8": b - a * np.exp(entropy), "val/pass@8": 0.9}
        lines.append(line)
    return lines


def draw(function, tmp_path, *arguments, **keywords):
    """The words of the picture: Matplotlib writes each as a comment beside its outlines."""
    path = tmp_path / "picture.svg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(*arguments[:1], path, *arguments[1:], **keywords)
    return path.read_text()


def test_run_plot_shows_every_panel_and_the_fit(tmp_path):
    words = draw(run_plot, tmp_path, run(), "law_grpo")
    for text in ("law_grpo", "Policy entropy", "pass@8", "Fraction of tokens clipped", "R = -0.50 exp(H) + 1.48"):
        assert text in words
    assert "ceiling 0.980 ± 0.000, R² 1.000" in words
    assert "no data" not in words


def test_the_largest_number_of_samples_is_drawn(tmp_path):
    keys = {"val/reward/mean@16": 0.5, "val/pass@4": 0.8, "val/pass@16": 0.9, "val/pass@16/low": 0.85}
    words = draw(run_plot, tmp_path, [{"step": 0, "val/reward/mean@4": 0.1} | keys], "run")
    for text in ("reward, mean@16", "pass@16", "held-out reward, mean@16"):
        assert text in words
    assert "mean@4" not in words and "pass@4" not in words


def test_intervals_are_drawn_as_a_band(tmp_path):
    plain = draw(run_plot, tmp_path, run(), "run")
    band = [line | {"val/pass@8/low": 0.8, "val/pass@8/high": 0.95} if "val/pass@8" in line else line for line in run()]
    assert draw(run_plot, tmp_path, band, "run").count("FillBetween") == plain.count("FillBetween") + 1


def test_run_plot_prefers_the_covariance(tmp_path):
    lines = [line | {"cov/mean": 0.1} for line in run()]
    words = draw(run_plot, tmp_path, lines, "run")
    assert "Covariance of log" in words
    assert "tokens clipped" not in words


@pytest.mark.parametrize(
    "lines,expected",
    [
        ([], ["no data: actor/entropy", "no data: cov/mean or actor/pg_clipfrac", "no data: val/reward/mean@n or"]),
        ([{"loss": 1.0}], ["no data: actor/entropy"]),
        (run(1), ["no fit: the law needs at least 3 points, got 1"]),
        (
            [line | {"val/entropy": 0.3} for line in run()],
            ["no fit: entropy does not vary: all 9 points lie at 0.3 nats"],
        ),
        ([line | {"val/reward/mean@8": 0.5} for line in run()], ["no fit: reward did not rise as entropy fell"]),
        ([line | {"val/entropy": line["step"] + 1.0} for line in run()], ["no fit: entropy rises over the run"]),
        ([{"step": 0, "actor/entropy": float("nan"), "actor/pg_clipfrac": None}], ["no data: actor/entropy"]),
        ([{"step": 3, "actor/entropy": 0.0}], ["no data: val/reward/mean@n"]),
    ],
)
def test_run_plot_says_what_is_missing(tmp_path, lines, expected):
    words = draw(run_plot, tmp_path, lines, "run")
    for text in expected:
        assert text in words


def test_stages_are_marked_and_fitted_apart(tmp_path):
    lines = run(41, stage=lambda step: "easy" if step < 20 else "hard")
    assert stage_boundaries(list(reversed(lines))) == [20.0]
    assert stage_boundaries([]) == []
    words = draw(run_plot, tmp_path, lines, "shift")
    assert "easy: R = -0.50 exp(H) + 1.48" in words
    assert "hard: R = -0.50 exp(H) + 1.48" in words


def test_comparison_plot_names_the_methods_the_shift_and_the_law(tmp_path):
    runs = {"GRPO": run(), "Clip-Cov": run(a=0.4), "entropy bonus": run(a=0.3)}
    words = draw(comparison_plot, tmp_path, runs, 20, law_run=run())
    for text in (*runs, "the task shifts", "R = -0.50 exp(H) + 1.48"):
        assert text in words
    words = draw(comparison_plot, tmp_path, runs, None)
    assert "the task shifts" not in words
    assert "exp(H)" not in words


def test_comparison_plot_of_nothing_says_so(tmp_path):
    words = draw(comparison_plot, tmp_path, {"GRPO": []}, 20, law_run=[])
    assert words.count("no data") >= 3


def test_more_runs_than_colours(tmp_path):
    words = draw(comparison_plot, tmp_path, {f"method {i}": run(11) for i in range(len(plots.COLOURS) + 2)}, None)
    assert "method 8" in words


def test_a_png_is_written(tmp_path):
    run_plot(run(), tmp_path / "plot.png", "run")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_law_points_fall_back_to_the_training_entropy():
    lines = [
        {"step": 5, "stage": "rl", "actor/entropy": 0.2, "val/reward/mean@8": 0.8},
        {"step": 0, "stage": "rl", "actor/entropy": 0.9, "val/entropy": 0.5, "val/reward/mean@8": 0.4},
        {"step": 1, "stage": "rl", "actor/entropy": 0.4},
    ]
    ((stage, (entropy, reward)),) = law_points(lines).items()
    assert (stage, entropy.tolist(), reward.tolist()) == ("rl", [0.5, 0.2], [0.4, 0.8])


def test_smooth_is_a_centred_mean_of_what_exists():
    values = np.arange(5.0) ** 2
    np.testing.assert_allclose(smooth(values, 3), [0.5, 5 / 3, 14 / 3, 29 / 3, 12.5])
    np.testing.assert_allclose(smooth(np.full(3, 2.0)), 2.0)
    with pytest.raises(ValueError, match="width must be odd and positive, got 4"):
        smooth(values, 4)

"""The law's fit against known coefficients, NumPy's own least squares and repeated draws."""

import doctest

import numpy as np
import pytest

from jentropy.theory import law as law_module
from jentropy.theory.law import (
    LawError,
    bootstrap_intervals,
    coverage,
    fit_law,
    fit_run,
    forecast,
)

A, B, NOISE = 0.5, 1.48, 0.02


def draw(seed, num_points=20, noise=NOISE):
    rng = np.random.default_rng(seed)
    entropy = np.linspace(0.8, 0.03, num_points)
    return entropy, B - A * np.exp(entropy) + noise * rng.standard_normal(num_points)


def test_recovers_known_coefficients_exactly():
    entropy, reward = draw(0, noise=0.0)
    fit = fit_law(entropy, reward)
    np.testing.assert_allclose([fit.a, fit.b, fit.ceiling], [A, B, B - A], rtol=1e-12)
    np.testing.assert_allclose([fit.r_squared, fit.rmse, fit.ceiling_stderr], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(fit.predict(entropy.reshape(4, 5)), reward.reshape(4, 5), rtol=1e-12)
    assert fit.num_points == 20


def test_equals_numpy_least_squares():
    entropy, reward = draw(1)
    weights = np.random.default_rng(1).uniform(0.5, 2.0, entropy.size)
    design = np.stack([-np.exp(entropy), np.ones_like(entropy)], axis=1)
    inverse = np.linalg.inv(design.T @ (weights[:, None] * design))
    coefficients = inverse @ design.T @ (weights * reward)
    residual = reward - design @ coefficients
    covariance = inverse * (weights * residual**2).sum() / (entropy.size - 2)
    for scale in (1.0, 1e6):  # only the ratios of weights matter
        fit = fit_law(entropy, reward, scale * weights)
        np.testing.assert_allclose([fit.a, fit.b], coefficients, rtol=1e-10)
        expected = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose([fit.a_stderr, fit.b_stderr], expected, rtol=1e-9)
        np.testing.assert_allclose(fit.covariance, covariance[0, 1], rtol=1e-9)
        contrast = np.array([-1.0, 1.0])
        np.testing.assert_allclose(fit.ceiling_stderr, np.sqrt(contrast @ covariance @ contrast), rtol=1e-8)
        np.testing.assert_allclose(fit.rmse, np.sqrt(np.average(residual**2, weights=weights)), rtol=1e-9)


def test_integer_weights_equal_repeated_points_and_zero_removes_one():
    entropy, reward = draw(2, num_points=6)
    repeated = fit_law(np.repeat(entropy, [2, 1, 3, 1, 1, 1]), np.repeat(reward, [2, 1, 3, 1, 1, 1]))
    weighted = fit_law(entropy, reward, [2, 1, 3, 1, 1, 1])
    np.testing.assert_allclose(
        [weighted.a, weighted.b, weighted.r_squared], [repeated.a, repeated.b, repeated.r_squared]
    )
    assert fit_law(entropy, reward, [1, 1, 1, 1, 1, 0]) == fit_law(entropy[:5], reward[:5])


def test_standard_errors_match_the_spread_over_draws():
    fits = [fit_law(*draw(seed)) for seed in range(400)]
    for name in ("a", "b", "ceiling"):
        spread = np.std([getattr(fit, name) for fit in fits], ddof=1)
        claimed = np.sqrt(np.mean([getattr(fit, f"{name}_stderr") ** 2 for fit in fits]))
        assert 0.85 < claimed / spread < 1.15  # a standard deviation over 400 draws is known to 3.5 %


def covered(intervals):
    """How often a 90 % interval of a, b and the ceiling holds the truth."""
    truth = np.array([A, B, B - A])
    low, high = np.moveaxis(np.array(intervals), -1, 0)
    return ((low <= truth) & (truth <= high)).mean(axis=0)


def test_bootstrap_intervals_cover_the_truth():
    found = covered([bootstrap_intervals(*draw(seed), seed, num_resamples=400) for seed in range(500)])
    assert ((0.85 <= found) & (found <= 0.95)).all()


def test_bootstrap_intervals_allow_for_noise_that_differs_along_the_curve():
    def noisy(seed):
        entropy, reward = draw(seed, noise=0.0)
        return entropy, reward + 0.1 * np.sqrt(reward * (1 - reward)) * np.random.default_rng(seed).normal(size=20)

    found = covered([bootstrap_intervals(*noisy(seed), seed, num_resamples=400) for seed in range(500)])
    assert ((0.85 <= found) & (found <= 0.95)).all()


def test_bootstrap_intervals_surround_the_estimates():
    entropy, reward = draw(3)
    fit, intervals = fit_law(entropy, reward), bootstrap_intervals(entropy, reward, 0)
    for name, (low, high) in intervals._asdict().items():
        middle, stderr = getattr(fit, name), getattr(fit, "ceiling_stderr" if name == "ceiling" else f"{name}_stderr")
        assert low < middle < high and 1.0 < (high - low) / (2 * stderr) < 2.5  # 1.73 for normal noise


def test_bootstrap_needs_points_that_do_not_hang_on_one():
    entropy, reward = [0.5, 0.5, 0.5, 0.2], [0.4, 0.45, 0.42, 0.8]
    assert fit_law(entropy, reward).num_points == 4
    with pytest.raises(LawError, match=r"the law hangs on one point, at 0.2 nats: without it"):
        bootstrap_intervals(entropy, reward, 0)


def test_interval_is_seeded_and_respects_level_and_weights():
    points = draw(3)
    assert bootstrap_intervals(*points, 5) == bootstrap_intervals(*points, 5) != bootstrap_intervals(*points, 6)
    wide, narrow = (bootstrap_intervals(*points, 5, level=level).ceiling for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    weights = np.r_[np.zeros(5), np.ones(15)]
    heavy = (points[0][5:], points[1][5:])
    assert bootstrap_intervals(*points, 5, weights=weights) == bootstrap_intervals(*heavy, 5)


def test_three_points_are_enough_for_fit_and_interval():
    entropy, reward = [0.5, 0.3, 0.1], [0.5, 0.7, 0.85]
    assert fit_law(entropy, reward).num_points == 3
    assert np.isfinite(bootstrap_intervals(entropy, reward, 0)).all()


def test_constant_reward_has_no_r_squared():
    fit = fit_law([0.5, 0.3, 0.1], [0.4, 0.4, 0.4])
    np.testing.assert_allclose([fit.a, fit.b], [0.0, 0.4], atol=1e-15)
    assert np.isnan(fit.r_squared)


@pytest.mark.parametrize(
    "entropy,reward,weights,message",
    [
        ([], [], None, "at least 3 points, got 0"),
        ([0.5, 0.4], [0.1, 0.2], None, "at least 3 points, got 2"),
        ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3], [1, 1, 0], "at least 3 points, got 2"),
        ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], None, "does not vary: all 3 points lie at 0.5 nats"),
        ([0.5, np.nan, 0.3], [0.1, 0.2, 0.3], None, "entropy is not finite at point 1"),
        ([0.5, 0.4, 0.3], [0.1, 0.2, np.inf], None, "reward is not finite at point 2"),
        ([0.5, 0.4, 800.0], [0.1, 0.2, 0.3], None, "overflows at entropy 800"),
        ([0.5, 0.4, 0.3], [0.1, 0.2], None, "3 entropies, 2 rewards, 3 weights"),
        ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3], [1, 1, -1], "weights must be >= 0, got -1"),
        ([[0.5, 0.4, 0.3]], [0.1, 0.2, 0.3], None, r"entropy must be a vector, got shape \(1, 3\)"),
    ],
)
def test_points_that_determine_nothing_are_refused(entropy, reward, weights, message):
    with pytest.raises(LawError, match=message):
        fit_law(entropy, reward, weights)
    with pytest.raises(LawError, match=message):
        bootstrap_intervals(entropy, reward, 0, weights=weights)


FALLING = [0.8, 0.5, 0.3, 0.2]


@pytest.mark.parametrize(
    "entropy,reward,message",
    [
        ([0.2, 0.3, 0.5, 0.8], [0.4, 0.5, 0.6, 0.7], "entropy rises over the run: none was spent"),
        ([0.5, 0.4, 0.6, 0.7], [0.9, 0.8, 0.7, 0.6], "entropy rises over the run"),  # although a > 0
        (FALLING, [0.8, 0.6, 0.5, 0.4], r"reward did not rise as entropy fell \(a <= 0\)"),
        (FALLING, [0.1, 0.1, 0.1, 0.1], "reward did not rise"),
        (FALLING, [0.0, 0.0, 0.0, 0.0], "reward did not rise"),
        ([0.5, 0.5, 0.5, 0.5], [0.8, 0.6, 0.5, 0.4], "entropy does not vary: all 4 points lie at 0.5 nats"),
        (FALLING[:2], [0.1, 0.2], "at least 3 points, got 2"),
    ],
)
def test_a_run_that_does_not_follow_the_law_has_no_number(entropy, reward, message):
    with pytest.raises(LawError, match=message):
        fit_run(entropy, reward)


def test_a_run_that_follows_the_law_is_fitted():
    assert fit_run(*draw(0)) == fit_law(*draw(0))
    entropy, reward = draw(1)
    entropy[-1] = entropy[-2] + 0.01  # not every step need spend some
    assert fit_run(entropy, reward).a > 0


def test_forecast_uses_only_the_first_points():
    entropy, reward = draw(4, noise=0.0)
    reward[10:] -= 0.05
    prediction = forecast(entropy, reward, fraction=0.5)
    assert prediction.law == fit_law(entropy[:10], reward[:10])
    assert prediction.num_predicted == 10
    np.testing.assert_allclose([prediction.rmse, prediction.bias], [0.05, 0.05], rtol=1e-9)
    np.testing.assert_allclose(prediction.predicted, reward[10:] + 0.05, rtol=1e-9)
    assert prediction.covered == 0.0
    same = forecast(entropy, reward, num_fitted=10)
    np.testing.assert_array_equal(same.low, prediction.low)


def test_forecast_interval_by_hand():
    """Half width t s sqrt(1 + 1/n + (x - mean x)^2 / sum (x - mean x)^2), t = 2.9200 for 90 % and 2 degrees."""
    entropy, reward = np.log([2.0, 1.8, 1.6, 1.4, 1.1]), np.array([0.5, 0.62, 0.68, 0.8, 0.9])
    found = forecast(entropy, reward, num_fitted=4)
    x, y = np.array([2.0, 1.8, 1.6, 1.4]), reward[:4]
    slope = ((x - 1.7) * (y - 0.65)).sum() / 0.2
    residual = y - 0.65 - slope * (x - 1.7)
    half = 2.9199855804 * np.sqrt((residual**2).sum() / 2 * (1 + 1 / 4 + (1.1 - 1.7) ** 2 / 0.2))
    expected = 0.65 + slope * (1.1 - 1.7)
    numbers = [found.predicted, found.low, found.high]
    np.testing.assert_allclose(numbers, [[expected], [expected - half], [expected + half]], rtol=1e-9)


def test_forecast_refuses_too_few_points():
    with pytest.raises(LawError, match="at least 3 points, got 2"):
        forecast(*draw(4), fraction=0.1)
    with pytest.raises(LawError, match="all 20 points are fitted: none is left to predict"):
        forecast(*draw(4), num_fitted=20)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\), got 1.0"):
        forecast(*draw(4), fraction=1.0)
    with pytest.raises(ValueError, match="give fraction or num_fitted, and not both"):
        forecast(*draw(4), fraction=0.5, num_fitted=3)


@pytest.mark.parametrize("fraction", [0.15, 0.3])
def test_forecast_intervals_cover_what_follows_the_law(fraction):
    runs = [draw(seed) for seed in range(500)]
    found = coverage(runs, fraction)
    assert 0.87 < found.covered < 0.93 and found.interval.low < found.covered < found.interval.high
    assert found.num_points == 500 * (20 - int(fraction * 20)) and len(found.rmse) == 500 and found.refused == {}
    assert coverage(runs, fraction, level=0.5).covered == pytest.approx(0.5, abs=0.04)


def test_coverage_shows_a_law_that_breaks():
    def bent(seed):
        entropy, reward = draw(seed, noise=0.002)
        reward[10:] -= 0.1
        return entropy, reward

    assert coverage([bent(seed) for seed in range(20)], 0.3).covered < 0.5


def test_coverage_counts_the_runs_without_a_forecast():
    short, flat = draw(0, num_points=4), (np.full(20, 0.5), np.linspace(0, 1, 20))
    found = coverage([draw(0), short, draw(1), flat], 0.3)
    assert set(found.refused) == {1, 3} and len(found.rmse) == 2
    assert "got 1" in found.refused[1] and "does not vary" in found.refused[3]
    with pytest.raises(LawError, match="at least 3 points, got 1; entropy does not vary"):
        coverage([short, flat], 0.3)
    with pytest.raises(LawError, match="there is no run"):
        coverage([], 0.3)


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(law_module).failed == 0

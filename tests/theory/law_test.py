"""The law's fit against known coefficients, NumPy's own least squares and repeated draws."""

import doctest

import numpy as np
import pytest

from jentropy.theory import law as law_module
from jentropy.theory.law import LawError, ceiling_interval, entropy_consumption, fit_law, forecast

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


def test_intervals_cover_the_true_ceiling():
    covered = [
        low <= B - A <= high for low, high in (ceiling_interval(*draw(s), s, num_resamples=400) for s in range(200))
    ]
    assert 0.78 <= np.mean(covered) <= 0.96  # nominal .90; resampling 20 points is a little narrow


def test_interval_is_seeded_and_respects_level_and_weights():
    points = draw(3)
    assert ceiling_interval(*points, 5) == ceiling_interval(*points, 5) != ceiling_interval(*points, 6)
    wide, narrow = ceiling_interval(*points, 5, level=0.99), ceiling_interval(*points, 5, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high
    weights = np.r_[np.zeros(5), np.ones(15)]
    assert ceiling_interval(*points, 5, weights=weights) == ceiling_interval(points[0][5:], points[1][5:], 5)


def test_three_points_are_enough_for_fit_and_interval():
    entropy, reward = [0.5, 0.3, 0.1], [0.5, 0.7, 0.85]
    assert fit_law(entropy, reward).num_points == 3
    assert np.isfinite(ceiling_interval(entropy, reward, 0)).all()


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
        ceiling_interval(entropy, reward, 0, weights=weights)


def test_forecast_uses_only_the_first_points():
    entropy, reward = draw(4, noise=0.0)
    reward[10:] -= 0.05
    prediction = forecast(entropy, reward, fraction=0.5)
    assert prediction.law == fit_law(entropy[:10], reward[:10])
    assert prediction.num_predicted == 10
    np.testing.assert_allclose([prediction.rmse, prediction.bias], [0.05, 0.05], rtol=1e-9)


def test_forecast_refuses_too_few_points():
    with pytest.raises(LawError, match="at least 3 points, got 2"):
        forecast(*draw(4), fraction=0.1)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\), got 1.0"):
        forecast(*draw(4), fraction=1.0)


def test_consumption_interpolates_between_points():
    rows = entropy_consumption([0, 10, 20, 40], [1.0, 0.4, 0.2, 0.0], [0.2, 0.6, 0.8, 1.0], (0.0, 0.125, 0.5, 1.0))
    expected = [(0.0, 0.0, 0.0, 0.0), (0.125, 5.0, 0.3, 0.25), (0.5, 20.0, 0.8, 0.75), (1.0, 40.0, 1.0, 1.0)]
    np.testing.assert_allclose(rows, expected, atol=1e-12)


@pytest.mark.parametrize(
    "step,entropy,reward,message",
    [
        ([0, 1, 2], [0.5, 0.2, 0.5], [0, 1, 2], "entropy is 0.5 at the first and the last point"),
        ([0, 1, 2], [0.5, 0.2, 0.1], [1, 0, 1], "reward is 1 at the first and the last point"),
        ([0, 0, 2], [0.5, 0.2, 0.1], [0, 1, 2], "step must increase"),
        ([0], [0.5], [0.1], "at least 2"),
    ],
)
def test_undefined_consumption_is_refused(step, entropy, reward, message):
    with pytest.raises(LawError, match=message):
        entropy_consumption(step, entropy, reward)


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(law_module).failed == 0

"""Importance correction and rejection: weights by hand, broken samplers, denominators, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import compose, normalisers, surrogates
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.importance_correction import importance_correction, rejection

MASK = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
RATIO = np.array([[9.0, 0.5, 4.0, 1.0], [9.0, 2.0, 0.25, 9.0], [9.0] * 4, [9.0, 3.0, 9.0, 9.0]])
ADVANTAGE = np.ones(MASK.shape, np.float32)


def make(ratio=RATIO, mask=MASK):
    """Signals with `ratio` as trainer's over sampler's probability."""
    batch = toy.rollouts(mask, logp_old=np.full(mask.shape, -1.0, np.float32))
    sampler = jnp.asarray(-1.0 - np.log(ratio), jnp.float32)
    return toy.signals(batch.replace(logp_sampler=sampler), log_prob=batch.logp_old)


def weight(mechanism, **options):
    return np.asarray(toy.update(mechanism, make(**options), ADVANTAGE).pg_weight)


LEVEL_RATIO = {
    "token": RATIO,
    "sequence": np.array([[2.0], [0.5], [1.0], [3.0]]),
    "sequence_mean": np.array([[2.0 ** (1 / 3)], [0.5**0.5], [1.0], [3.0]]),
}
every_level = pytest.mark.parametrize("level", LEVEL_RATIO)


@every_level
def test_truncation_by_hand(level):
    found = weight(importance_correction(level=level, lower=0.75, rollout_is_threshold=1.5))
    np.testing.assert_allclose(found, np.where(MASK, np.clip(LEVEL_RATIO[level], 0.75, 1.5), 0.0), rtol=1e-6)


@every_level
def test_masking_by_hand(level):
    found = weight(importance_correction(level=level, mode="mask", lower=0.6, rollout_is_threshold=2.5))
    ratio = LEVEL_RATIO[level]
    kept = (ratio >= 0.6) & (ratio <= 2.5)
    np.testing.assert_allclose(found, np.where(MASK, kept * ratio, 0.0), rtol=1e-6)


def test_the_default_truncates_tokens_at_two():
    np.testing.assert_allclose(weight(importance_correction()), np.where(MASK, np.minimum(RATIO, 2.0), 0.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("level", "mean"), [("token", (0.5 + 2 + 1 + 2 + 0.25 + 2) / 6), ("sequence", (2 + 0.5 + 2) / 3)]
)
def test_division_by_the_mean_weight(level, mean):
    found = weight(importance_correction(level=level, batch_normalise=True))
    expected = np.minimum(LEVEL_RATIO[level], 2.0) / mean
    np.testing.assert_allclose(found, np.where(MASK, expected, 0.0), rtol=1e-6)


def test_it_multiplies_what_is_there_and_leaves_terms_and_denominators():
    signals = make()
    signals = signals.replace(scores={**signals.scores, "entropy": jnp.ones(MASK.shape)})
    before = toy.update(entropy_bonus(entropy_coef=0.5), signals, ADVANTAGE)
    before = before.replace(pg_weight=before.pg_weight * 0.5)
    plan = toy.update(importance_correction(), signals, ADVANTAGE, plan=before)
    np.testing.assert_allclose(plan.pg_weight, np.where(MASK, np.minimum(RATIO, 2.0) / 2.0, 0.0), rtol=1e-6)
    np.testing.assert_array_equal(plan.terms["entropy"], before.terms["entropy"])
    np.testing.assert_array_equal(plan.counted, MASK)


def test_the_weight_comes_after_the_clip_of_the_surrogate():
    signals = make()
    moved = signals.replace(scores={"log_prob": signals.batch.logp_old + jnp.log(jnp.float32(1.5))})
    chain = compose.chain(clip=clip_range(), correction=importance_correction())
    plan = toy.update(chain, moved, ADVANTAGE)
    value, gradient, _ = toy.loss_and_gradient(
        plan, moved, surrogate=surrogates.ratio, normaliser=normalisers.token_sum
    )
    np.testing.assert_allclose(value, -1.2 * np.minimum(RATIO, 2.0)[MASK].sum(), rtol=1e-6)
    assert not np.any(gradient)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_sampler_that_gives_nan_or_infinity(level, mode):
    ratio = RATIO.copy()
    signals = make(ratio)
    sampler = signals.batch.logp_sampler.at[0, 1].set(jnp.nan).at[1, 1].set(-jnp.inf).at[1, 2].set(jnp.inf)
    broken = signals.replace(batch=signals.batch.replace(logp_sampler=sampler))
    found = toy.update(importance_correction(level=level, mode=mode), broken, ADVANTAGE).pg_weight
    assert np.all(np.isfinite(found))
    ratio[0, 1] = 1.0
    np.testing.assert_allclose(
        found[0], weight(importance_correction(level=level, mode=mode), ratio=ratio)[0], rtol=1e-6
    )
    if level == "token":
        assert found[1, 1] == (2.0 if mode == "truncate" else 0.0) and 0.0 < found[1, 2] < 1e-8


@pytest.mark.parametrize("batch_normalise", [False, True])
def test_all_weights_zero(batch_normalise):
    mechanism = importance_correction(
        mode="mask", lower=50.0, rollout_is_threshold=60.0, batch_normalise=batch_normalise
    )
    plan = toy.update(mechanism, make(), ADVANTAGE)
    assert not np.any(plan.pg_weight)
    assert plan.metrics["rollout_is/effective_sample_size"] == (0.0, 1.0)
    assert plan.metrics["rollout_is/outside_fraction"] == (6.0, 6.0)


@pytest.mark.parametrize("mechanism", [importance_correction(batch_normalise=True), rejection()])
def test_empty_batch(mechanism):
    plan = toy.update(mechanism, make(mask=np.zeros_like(MASK)), ADVANTAGE)
    assert not np.any(plan.pg_weight) and all(np.isfinite(total) for total, _ in plan.metrics.values())


def test_metrics_of_the_weights():
    metrics = toy.update(importance_correction(lower=0.3), make(), ADVANTAGE).metrics
    found = {k: (float(total), float(count)) for k, (total, count) in metrics.items()}
    w = np.array([0.5, 2.0, 1.0, 2.0, 0.3, 2.0])
    assert found["rollout_is/mean"] == pytest.approx((w.sum(), 6.0))
    assert found["rollout_is/outside_fraction"] == (3.0, 6.0)
    assert found["rollout_is/effective_sample_size"] == pytest.approx((w.sum() ** 2 / (6.0 * (w**2).sum()), 1.0))


KEPT = {
    ("token", "ratio", 0.4, 2.5): [[0, 1, 0, 1], [0, 1, 0, 0], [0] * 4, [0] * 4],
    ("sequence", "ratio", 0.6, 2.5): [[0, 1, 1, 1], [0] * 4, [0] * 4, [0] * 4],
    ("sequence_mean", "ratio", 0.6, 2.5): [[0, 1, 1, 1], [0, 1, 1, 0], [0] * 4, [0] * 4],
    ("sequence_max", "ratio", 0.4, 5.0): [[0, 1, 1, 1], [0] * 4, [0] * 4, [0, 1, 0, 0]],
    # d² / 2 of (1/2, 4, 1), (2, 1/4), (3): (.24, .96, 0), (.24, .96), (.60)
    ("token", "k2", None, 0.5): [[0, 1, 0, 1], [0, 1, 0, 0], [0] * 4, [0] * 4],
    ("sequence_mean", "k2", None, 0.55): [[0, 1, 1, 1], [0] * 4, [0] * 4, [0] * 4],
    ("sequence_max", "k2", None, 0.7): [[0] * 4, [0] * 4, [0] * 4, [0, 1, 0, 0]],
    # eᵈ - 1 - d: (.19, 1.61, 0), (.31, .64), (.90)
    ("token", "k3", None, 0.7): [[0, 1, 0, 1], [0, 1, 1, 0], [0] * 4, [0] * 4],
    ("sequence", "k3", None, 1.0): [[0] * 4, [0, 1, 1, 0], [0] * 4, [0, 1, 0, 0]],
}


@pytest.mark.parametrize("denominator", ["kept", "all"])
@pytest.mark.parametrize(("setting", "kept"), KEPT.items(), ids=[f"{k[0]}-{k[1]}" for k in KEPT])
def test_rejection_by_hand(setting, kept, denominator):
    level, statistic, lower, upper = setting
    mechanism = rejection(level=level, statistic=statistic, lower=lower, upper=upper, denominator=denominator)
    plan = toy.update(mechanism, make(), ADVANTAGE)
    np.testing.assert_array_equal(plan.pg_weight, np.array(kept, np.float32))
    np.testing.assert_array_equal(plan.counted, np.array(kept, bool) if denominator == "kept" else MASK)
    lost = MASK & ~np.array(kept, bool)
    assert plan.metrics["rollout_rs/masked_fraction"] == (lost.sum(), 6.0)
    assert plan.metrics["rollout_rs/seq_masked_fraction"] == (lost.any(1).sum(), 3.0)


def test_one_bound_of_the_ratio_is_also_the_inverse_of_the_other():
    assert rejection(upper=1.25).init() == rejection(lower=0.8, upper=1.25).init()


def test_rejection_shrinks_the_mean_of_the_loss():
    signals = make()
    plan = toy.update(rejection(level="token", lower=0.4, upper=2.5), signals, ADVANTAGE)
    value, _, _ = toy.loss_and_gradient(plan, signals, surrogate=surrogates.ratio, normaliser=normalisers.token_mean)
    assert value == pytest.approx(-1.0)


def test_both_in_one_chain():
    chain = compose.chain(reject=rejection(level="token", lower=0.4, upper=2.5), weigh=importance_correction())
    expected = np.where(MASK & (RATIO >= 0.4) & (RATIO <= 2.5), np.minimum(RATIO, 2.0), 0.0)
    np.testing.assert_allclose(weight(chain), expected, rtol=1e-6)


@pytest.mark.parametrize("mechanism", [importance_correction(level="sequence"), rejection()])
def test_garbage_outside_the_mask_does_not_matter(mechanism):
    dirty = np.where(MASK, RATIO, np.nan)
    clean = toy.update(mechanism, make(), ADVANTAGE)
    jax.tree.map(np.testing.assert_array_equal, clean, toy.update(mechanism, make(dirty), ADVANTAGE))


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (importance_correction, {"level": "row"}, "level must be one of .*, got 'row'"),
        (importance_correction, {"level": "sequence_max"}, "level must be one of .*, got 'sequence_max'"),
        (importance_correction, {"mode": "drop"}, "mode must be truncate or mask, got 'drop'"),
        (importance_correction, {"rollout_is_threshold": 0.0}, r"rollout_is_threshold must be above 0, got 0\.0"),
        (importance_correction, {"lower": 2.5}, r"lower must be in \[0, 2\.0\], got 2\.5"),
        (importance_correction, {"lower": -0.1}, r"lower must be in \[0, 2\.0\], got -0\.1"),
        (rejection, {"level": "row"}, "level must be one of .*, got 'row'"),
        (rejection, {"statistic": "k1"}, "statistic must be one of .*, got 'k1'"),
        (rejection, {"upper": -1.0}, r"upper must be above 0, got -1\.0"),
        (rejection, {"upper": 0.5}, r"upper must be at least 1 without a lower bound, got 0\.5"),
        (rejection, {"lower": 2.0}, r"lower must be None or in \[0, 1\.001\], got 2\.0"),
        (rejection, {"statistic": "k3", "lower": 0.1}, r"lower must be None with statistic = 'k3', got 0\.1"),
        (rejection, {"denominator": "selected"}, "denominator must be kept or all, got 'selected'"),
    ],
)
def test_refusals(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**options)

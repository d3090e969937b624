"""Policy-gradient losses against loops in NumPy, at their bounds, and on garbage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import normalisers, surrogates
from jentropy.base import initial_plan
from jentropy.mechanisms.clip_range import clip_range

OLD = np.zeros((2, 4), np.float32)
RATIO = np.array([[0.5, 1.1, 1.5, 0.9], [1.5, 0.5, 4.0, 7.0]])
ADVANTAGE = np.array([[2.0, 1.0, 1.0, -1.0], [-1.0, -2.0, -0.5, 9.0]], np.float32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)


def make(mask=MASK, log_prob=None, advantage=ADVANTAGE):
    log_prob = np.log(RATIO).astype(np.float32) if log_prob is None else np.asarray(log_prob, np.float32)
    signals = toy.signals(toy.rollouts(mask, logp_old=OLD[: len(mask), : mask.shape[1]]), log_prob=log_prob)
    return signals, toy.update(clip_range(epsilon_low=0.2, epsilon_high=0.3), signals, jnp.asarray(advantage))


def run(surrogate, signals, plan):
    return toy.loss_and_gradient(plan, signals, surrogate=surrogate, normaliser=normalisers.token_sum)


def test_ratio_by_hand():
    value, gradient, metrics = run(surrogates.ratio, *make())
    # -min(r A, clip(r, .8, 1.3) A): clipped where A > 0 and r > 1.3, or A < 0 and r < .8.
    expected = np.array([[-1.0, -1.1, -1.3, 0.9], [1.5, 1.6, 2.0, 0.0]])
    active = np.array([[1, 1, 0, 1], [1, 0, 1, 0]])
    np.testing.assert_allclose(value, expected.sum(), rtol=2e-6)
    np.testing.assert_allclose(gradient, -active * RATIO * ADVANTAGE, rtol=2e-6)
    sums = {k: float(total) for k, (total, count) in metrics.items() if count == 7.0}
    assert sums.pop("actor/ppo_kl") == pytest.approx(-np.log(RATIO)[MASK].sum(), rel=2e-6)
    assert sums == {
        "actor/pg_clipfrac": 2.0,
        "clip_ratio/low_mean": 1.0,
        "clip_ratio/high_mean": 1.0,
        "clip_ratio/region_mean": 2.0,
    }


def test_without_bounds_the_loss_is_minus_ratio_times_advantage():
    signals, _ = make()
    value, _, metrics = run(surrogates.ratio, signals, initial_plan(signals.batch, jnp.asarray(ADVANTAGE)))
    np.testing.assert_allclose(value, -(RATIO * ADVANTAGE)[MASK].sum(), rtol=2e-6)
    assert metrics["actor/pg_clipfrac"][0] == 0.0


def test_dual_clip_by_hand():
    value, gradient, metrics = run(surrogates.dual_clip(clip_ratio_c=3.0), *make())
    expected = np.array([[-1.0, -1.1, -1.3, 0.9], [1.5, 1.6, 1.5, 0.0]])  # [1, 2]: c |A| = 1.5 < 2
    active = np.array([[1, 1, 0, 1], [1, 0, 0, 0]])
    np.testing.assert_allclose(value, expected.sum(), rtol=2e-6)
    np.testing.assert_allclose(gradient, -active * RATIO * ADVANTAGE, rtol=2e-6)
    assert metrics["actor/pg_clipfrac_lower"] == (1.0, 7.0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gradient_lives_at_the_bound(advantage):
    signals, plan = make(np.ones((1, 1), bool), [[0.0]], np.full((1, 1), advantage, np.float32))
    plan = plan.replace(ratio_low=jnp.ones((1, 1)), ratio_high=jnp.ones((1, 1)))
    _, gradient, metrics = run(surrogates.ratio, signals, plan)
    assert gradient == -advantage
    assert metrics["actor/pg_clipfrac"][0] == 0.0


def test_far_policies_give_finite_losses_and_no_gradient():
    signals, plan = make(np.ones((1, 2), bool), [[-500.0, 500.0]], np.array([[1.0, -1.0]], np.float32))
    value, gradient, _ = run(surrogates.ratio, signals, plan)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient, [[0.0, 0.0]])


ALL = {
    "ratio": surrogates.ratio,
    "dual_clip": surrogates.dual_clip(),
    "reinforce": surrogates.reinforce,
    "gspo": surrogates.gspo(),
    "gspo_token": surrogates.gspo(form="token"),
    "sequence_ratio": surrogates.sequence_ratio,
    "cispo": surrogates.cispo(),
    "cispo_cap": surrogates.cispo(cap=1.2),
}
every_surrogate = pytest.mark.parametrize("surrogate", ALL.values(), ids=ALL)


@every_surrogate
def test_nothing_outside_the_mask_matters(surrogate):
    signals, plan = make()
    value, gradient, metrics = run(surrogate, signals, plan)
    batch = signals.batch.replace(logp_old=jnp.where(MASK, signals.batch.logp_old, -jnp.inf))
    dirty = toy.signals(batch, log_prob=jnp.where(MASK, signals.scores["log_prob"], jnp.nan))
    same = run(surrogate, dirty, plan.replace(advantage=jnp.where(MASK, plan.advantage, jnp.inf)))
    jax.tree.map(np.testing.assert_array_equal, (value, gradient, metrics), same)
    assert np.any(gradient)


@every_surrogate
def test_an_empty_batch_has_no_loss_and_no_gradient(surrogate):
    signals, plan = make(np.zeros((2, 4), bool))
    value, gradient, metrics = run(surrogate, signals, plan)
    assert value == 0.0 and not np.any(gradient)
    assert all(total == count == 0.0 for total, count in metrics.values())


@every_surrogate
def test_rows_are_never_mixed(surrogate):
    signals, plan = make()
    changed = make(log_prob=np.log(RATIO) * [[1.0], [0.3]])[0]
    np.testing.assert_array_equal(run(surrogate, signals, plan)[1][0], run(surrogate, changed, plan)[1][0])


@every_surrogate
def test_one_gradient_at_the_old_policy(surrogate):
    advantage = np.array([[2.0] * 4, [-0.5] * 4], np.float32)
    signals, plan = make(log_prob=OLD, advantage=advantage)
    _, gradient, _ = toy.loss_and_gradient(
        plan, signals, surrogate=surrogate, normaliser=normalisers.sequence_mean_token_mean
    )
    per_row = np.array([[1 / 4], [1 / 3]]) / 2
    if surrogate is surrogates.sequence_ratio:
        per_row = np.full((2, 1), 1 / 2)
    np.testing.assert_allclose(gradient, np.where(MASK, -advantage * per_row, 0.0), rtol=1e-6)


def test_metrics_count_tokens_with_a_policy_gradient():
    signals, plan = make()
    plan = plan.replace(pg_weight=plan.pg_weight.at[0].set(0.0))
    _, _, metrics = run(surrogates.ratio, signals, plan)
    assert metrics["actor/pg_clipfrac"] == (1.0, 3.0)


def test_reinforce_has_the_gradient_of_the_ratio_at_the_old_policy():
    signals, plan = make(log_prob=OLD)
    value, gradient, metrics = run(surrogates.reinforce, signals, plan)
    np.testing.assert_array_equal(gradient, run(surrogates.ratio, signals, plan)[1])
    np.testing.assert_array_equal(gradient, np.where(MASK, -ADVANTAGE, 0.0))
    assert value == 0.0 and metrics["actor/ppo_kl"][0] == 0.0


def test_dual_clip_compares_by_value_and_refuses_numbers_up_to_one():
    assert hash(surrogates.dual_clip()) == hash(surrogates.dual_clip(clip_ratio_c=3))
    assert surrogates.dual_clip() != surrogates.dual_clip(clip_ratio_c=10.0)
    with pytest.raises(ValueError, match=r"clip_ratio_c must be above 1, got 1\.0"):
        surrogates.dual_clip(clip_ratio_c=1.0)


def sequences(mask=MASK):
    """Log-ratios whose row means are ±.01, old policy 0, one advantage per row; bounds .2 and .3."""
    log_prob = np.array([[0.1, -0.2, 0.1, 0.04], [-0.06, 0.02, 0.01, 3.0]])
    return make(mask, log_prob, np.array([[2.0] * 4, [-0.5] * 4], np.float32))


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_gspo_by_hand(form):
    signals, plan = sequences()
    value, gradient, metrics = run(surrogates.gspo(form=form), signals, plan)
    s = np.exp([0.04 / 4, -0.03 / 3])
    np.testing.assert_allclose(value, 4 * -2.0 * s[0] + 3 * 0.5 * s[1], rtol=2e-6)
    np.testing.assert_allclose(gradient, MASK * np.array([[-2.0 * s[0]], [0.5 * s[1]]]), rtol=2e-6)
    assert metrics["actor/pg_clipfrac"] == (0.0, 7.0)
    assert metrics["actor/ppo_kl"][0] == pytest.approx(-0.04 + 0.03, rel=1e-5)


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_gspo_clips_whole_responses(form):
    signals, plan = sequences()
    plan = plan.replace(ratio_low=jnp.full((2, 4), 1 - 3e-4), ratio_high=jnp.full((2, 4), 1 + 4e-4))
    value, gradient, metrics = run(surrogates.gspo(form=form), signals, plan)
    np.testing.assert_allclose(value, 4 * -2.0 * (1 + 4e-4) + 3 * 0.5 * (1 - 3e-4), rtol=2e-6)
    assert not np.any(gradient)
    assert metrics["clip_ratio/high_mean"] == (4.0, 7.0) and metrics["clip_ratio/low_mean"] == (3.0, 7.0)


def test_the_forms_of_gspo_differ_where_advantages_differ_within_a_response():
    signals, plan = sequences()
    plan = plan.replace(advantage=jnp.asarray([[1.0, -1.0, 3.0, 0.0], [0.0] * 4]))
    s = np.exp(0.01)
    gradient = {form: run(surrogates.gspo(form=form), signals, plan)[1][0] for form in ("sequence", "token")}
    np.testing.assert_allclose(gradient["token"], -s * np.array([1.0, -1.0, 3.0, 0.0]), rtol=2e-6)
    np.testing.assert_allclose(gradient["sequence"], np.full(4, -s * 3.0 / 4.0), rtol=2e-6)


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_gspo_is_clamped_above_only(form):
    signals, plan = make(np.ones((2, 1), bool), [[300.0], [-300.0]], np.array([[-1.0], [1.0]], np.float32))
    value, gradient, _ = run(surrogates.gspo(form=form), signals, plan)
    np.testing.assert_allclose(value, np.exp(10.0), rtol=1e-5)
    np.testing.assert_array_equal(gradient, [[0.0], [0.0]])


def test_sequence_ratio_by_hand():
    signals, plan = sequences()
    value, gradient, metrics = run(surrogates.sequence_ratio, signals, plan)
    r = np.exp([0.04, -0.03])
    np.testing.assert_allclose(value, 4 * -2.0 * r[0] + 3 * 0.5 * r[1], rtol=2e-6)
    np.testing.assert_allclose(gradient, MASK * np.array([[4 * -2.0 * r[0]], [3 * 0.5 * r[1]]]), rtol=2e-6)
    assert metrics["actor/pg_clipfrac"] == (0.0, 7.0)
    far, plan = make(np.ones((1, 2), bool), [[-400.0, -400.0]], np.ones((1, 2), np.float32))
    value, gradient, _ = run(surrogates.sequence_ratio, far, plan)
    assert np.isfinite(value) and not np.any(gradient)


@pytest.mark.parametrize(("cap", "low", "high"), [(None, 0.8, 1.3), (1.2, 0.0, 1.2), (100.0, 0.0, 100.0)])
def test_cispo_by_hand(cap, low, high):
    signals, plan = make()
    value, gradient, metrics = run(surrogates.cispo(cap=cap), signals, plan)
    weight = np.clip(RATIO, low, high)
    np.testing.assert_allclose(value, -(weight * ADVANTAGE * np.log(RATIO))[MASK].sum(), rtol=2e-6)
    np.testing.assert_allclose(gradient, np.where(MASK, -weight * ADVANTAGE, 0.0), rtol=2e-6)
    assert metrics["actor/pg_clipfrac"] == ((weight != RATIO)[MASK].sum(), 7.0)
    assert metrics["clip_ratio/low_mean"] == ((RATIO < low)[MASK].sum(), 7.0)
    assert metrics["clip_ratio/high_mean"] == ((RATIO > high)[MASK].sum(), 7.0)


def test_surrogates_compare_by_value():
    assert hash(surrogates.gspo()) == hash(surrogates.gspo(form="sequence")) != hash(surrogates.gspo(form="token"))
    assert surrogates.cispo(cap=5) == surrogates.cispo(cap=5.0) != surrogates.cispo()


def test_refusals_of_gspo_and_cispo():
    with pytest.raises(ValueError, match="form must be sequence or token, got 'row'"):
        surrogates.gspo(form="row")
    with pytest.raises(ValueError, match=r"cap must be at least 1 or None, got 0\.28"):
        surrogates.cispo(cap=0.28)

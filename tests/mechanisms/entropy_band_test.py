"""The entropy band: the guard's rule on both sides, when it moves, and that it holds a policy in its band."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy import features, normalisers, surrogates
from jentropy.base import ENTROPY, initial_plan
from jentropy.compose import chain
from jentropy.mechanisms.clip_range import clip_range
from jentropy.mechanisms.entropy_band import control, entropy_band
from jentropy.mechanisms.entropy_bonus import entropy_bonus

BATCH = toy.rollouts([[True, True]])
NUMBERS = {
    "entropy_low": 0.5,
    "entropy_high": 1.5,
    "margin": 0.25,
    "entropy_coef_delta": 0.25,
    "entropy_coef_max": 0.625,
}
control = jax.jit(control)


def signals(entropy, step, index=0):
    """One update of the rollout `step`, both of whose tokens have this entropy."""
    scored = toy.signals(BATCH, log_prob=jnp.zeros((1, 2)), entropy=jnp.full((1, 2), entropy, jnp.float32))
    return scored.replace(step=jnp.int32(step), update_index=jnp.int32(index))


def run(mechanism, updates, state=None):
    """The coefficients applied in updates `(entropy, step)`, one after the other, why, and the last state."""
    state, applied, why, seen = mechanism.init() if state is None else state, [], [], []
    update = toy._jitted(mechanism.update)
    for entropy, step in updates:
        plan, state = update(initial_plan(BATCH, jnp.zeros((1, 2))), state, signals(entropy, step), jax.random.key(0))
        below, above = (float(plan.metrics[f"entropy_band/{name}"][0]) for name in ("below", "above"))
        applied.append(float(plan.metrics["actor/entropy_coef"][0]))
        why.append(int(below - above))
        np.testing.assert_array_equal(plan.terms["entropy"], np.full((1, 2), -applied[-1] / 2))
        assert plan.metrics["entropy_band/coef"] == (applied[-1], 1.0)
        assert below * above == 0.0
        seen.append(tuple(map(float, plan.metrics["entropy_band/entropy"])))
    first = [i == 0 or step != updates[i - 1][1] for i, (_, step) in enumerate(updates)]
    assert seen == [(2 * entropy, 2.0) if new else (0.0, 0.0) for new, (entropy, _) in zip(first, updates)]
    return applied, why, state


def rollouts_of(entropies):
    return [(entropy, step) for step, entropy in enumerate(entropies)]


def test_below_the_band_by_hand():
    # It acts from below .5 until .75 is reached; the ends themselves are inside.
    entropies = [0.5, 0.25, 0.5, 0.625, 0.25, 0.75, 0.625, 0.5, 1.5, 1.0]
    applied, why, state = run(entropy_band(**NUMBERS), rollouts_of(entropies))
    assert applied == [0.0, 0.25, 0.5, 0.625, 0.625, 0.375, 0.125, 0.0, 0.0, 0.0]
    assert why == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert state.step == 9


def test_above_the_band_by_hand():
    entropies = [1.5, 1.75, 1.5, 1.375, 2.0, 1.25, 1.375, 1.5, 0.5, 1.0]
    applied, why, _ = run(entropy_band(**NUMBERS), rollouts_of(entropies))
    assert applied == [0.0, -0.25, -0.5, -0.625, -0.625, -0.375, -0.125, 0.0, 0.0, 0.0]
    assert why == [0, -1, -1, -1, -1, 0, 0, 0, 0, 0]


def test_from_one_side_to_the_other_at_once():
    # What has been wound up on one side never works on the other.
    applied, why, _ = run(entropy_band(**NUMBERS), rollouts_of([0.0, 0.0, 9.0, 9.0, 0.0, 1.0, 9.0]))
    assert applied == [0.25, 0.5, -0.25, -0.5, 0.25, 0.0, -0.25]
    assert why == [1, 1, -1, -1, 1, 0, -1]


def test_the_return_has_a_step_of_its_own():
    mechanism = entropy_band(**{**NUMBERS, "entropy_coef_return": 0.0625})
    assert run(mechanism, rollouts_of([0.0, 1.0, 1.0, 1.0, 1.0, 1.0]))[0] == [0.25, 0.1875, 0.125, 0.0625, 0.0, 0.0]
    stays = entropy_band(**{**NUMBERS, "entropy_coef_return": 0.0})
    assert run(stays, rollouts_of([2.0, 1.0, 1.0]))[0] == [-0.25] * 3


def test_one_end_only():
    no_ceiling = entropy_band(**{**NUMBERS, "entropy_high": float("inf")})
    assert run(no_ceiling, rollouts_of([1e9, 0.25, 0.625, 1e9]))[0] == [0.0, 0.25, 0.5, 0.25]
    no_floor = entropy_band(**{**NUMBERS, "entropy_low": 0.0})
    assert run(no_floor, rollouts_of([0.0, 2.0, 0.0]))[0] == [0.0, -0.25, 0.0]


def test_all_updates_of_a_rollout_share_the_coefficient_of_the_first():
    applied, why, _ = run(entropy_band(**NUMBERS), [(0.25, 0), (9.0, 0), (1.0, 0), (0.25, 1), (1.0, 1), (1.0, 2)])
    assert applied == [0.25, 0.25, 0.25, 0.5, 0.5, 0.25] and why == [1, 1, 1, 1, 1, 0]


def test_a_skipped_update_does_not_lose_the_move():
    # The step keeps the state from before an update that it skips.
    mechanism = entropy_band(**NUMBERS)
    _, _, before = run(mechanism, [(0.25, 0)])
    update = toy._jitted(mechanism.update)
    update(initial_plan(BATCH, jnp.zeros((1, 2))), before, signals(0.25, 1, 0), jax.random.key(0))
    plan, state = update(initial_plan(BATCH, jnp.zeros((1, 2))), before, signals(0.25, 1, 1), jax.random.key(0))
    assert plan.metrics["actor/entropy_coef"] == (0.5, 1.0) and state.coef == 0.5
    assert run(mechanism, [(0.25, 7)], before)[0] == [0.5]  # a run may go on at any rollout


def test_an_update_without_a_token_moves_nothing():
    mechanism = entropy_band(**NUMBERS)
    empty = signals(jnp.nan, 0).replace(batch=BATCH.replace(loss_mask=jnp.zeros((1, 2), bool)))
    plan, state = mechanism.update(initial_plan(BATCH, jnp.zeros((1, 2))), mechanism.init(), empty, None)
    jax.tree.map(np.testing.assert_array_equal, state, mechanism.init())
    assert not np.any(plan.terms["entropy"])
    assert run(mechanism, [(0.25, 0)], state)[0] == [0.25]


def test_it_tells_when_it_is_at_its_bound():
    mechanism = entropy_band(**NUMBERS)
    state, found = mechanism.init(), []
    for step, entropy in enumerate([0.0, 0.0, 0.0, 1.0, 9.0, 9.0, 9.0]):
        plan, state = toy._jitted(mechanism.update)(
            initial_plan(BATCH, jnp.zeros((1, 2))), state, signals(entropy, step), jax.random.key(0)
        )
        found.append(float(plan.metrics["entropy_band/at_bound"][0]))
    assert found == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_mean_over_tokens_the_normaliser_and_tokens_without_policy_gradient():
    batch, scored, advantage = toy.random_batch(fill=np.nan)
    mask = np.asarray(batch.loss_mask)
    mean = float(np.asarray(scored.scores["entropy"])[mask].mean())
    numbers = {**NUMBERS, "entropy_low": mean * 1.01, "entropy_high": 9.0}
    mechanism = entropy_band(normaliser=normalisers.sequence_mean_token_mean, **numbers)
    plan = initial_plan(batch, advantage)
    plan = toy.update(mechanism, scored, advantage, plan=plan.replace(counted=jnp.zeros_like(plan.counted)))
    weight = normalisers.sequence_mean_token_mean(batch.loss_mask, batch)
    np.testing.assert_allclose(plan.terms["entropy"], -0.25 * weight, rtol=1e-6)
    total, count = plan.metrics["entropy_band/entropy"]
    assert count == mask.sum() and total == pytest.approx(mean * mask.sum(), rel=1e-6)
    assert mechanism.outputs == (ENTROPY,)
    np.testing.assert_array_equal(mechanism.terms["entropy"](scored.scores, plan, batch), scored.scores["entropy"])
    inside = toy.update(entropy_band(**{**numbers, "entropy_low": mean * 0.99}), scored, advantage)
    assert not np.any(inside.terms["entropy"])


def test_garbage_outside_the_mask_does_not_matter():
    mechanism = entropy_band(**NUMBERS)
    clean, dirty = (toy.update(mechanism, *toy.random_batch(fill=fill)[1:]) for fill in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_a_bound_of_0_is_neutral():
    mechanism = entropy_band(**{**NUMBERS, "entropy_coef_max": 0.0})
    assert run(mechanism, rollouts_of([0.0, 9.0, 1.0]))[0] == [0.0] * 3


guards = st.fixed_dictionaries(
    {
        "entropy_low": st.floats(0, 1),
        "entropy_high": st.floats(1.5, 3),
        "margin": st.floats(0, 0.25),
        "entropy_coef_delta": st.floats(0, 0.1),
        "entropy_coef_return": st.floats(0, 0.1),
        "entropy_coef_max": st.floats(0, 0.3),
    }
)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(guards, st.lists(st.floats(0, 4), min_size=1, max_size=12))
def test_bounded_and_never_away_from_the_band(numbers, entropies):
    state = entropy_band(**numbers).init()
    low, high, margin = (np.float32(numbers[name]) for name in ("entropy_low", "entropy_high", "margin"))
    for entropy in map(np.float32, entropies):
        before, state = state, control(state, entropy)
        coef, side = float(state.coef), int(state.side)
        assert abs(coef) <= float(state.entropy_coef_max)
        assert coef * side >= 0.0
        if low <= entropy <= high and before.side == 0:
            assert side == 0 and abs(coef) <= abs(float(before.coef))
        if entropy < low or entropy > high:
            assert side == (1 if entropy < low else -1)
        if low + margin <= entropy <= high - margin:
            assert side == 0


@settings(derandomize=True, deadline=None, max_examples=40)
@given(guards, st.lists(st.floats(0, 4), max_size=8), st.floats(0, 4), st.floats(0, 4))
def test_a_lower_entropy_never_gives_a_smaller_coefficient(numbers, entropies, one, other):
    state = entropy_band(**numbers).init()
    for entropy in entropies:
        state = control(state, np.float32(entropy))
    lower, higher = (control(state, np.float32(entropy)) for entropy in sorted((one, other)))
    assert lower.coef >= higher.coef and lower.side >= higher.side


# A tabular policy that is trained by its plan: four states, eight actions.

NUM_STATES, NUM_ACTIONS, NUM_ROWS = 4, 8, 128
STATE = np.arange(NUM_ROWS) % NUM_STATES
REWARD = np.random.default_rng(0).normal(size=(NUM_STATES, NUM_ACTIONS)).astype(np.float32)
LOW, HIGH, MARGIN = 0.8, 1.5, 0.05
SETTLED = 200


def beside(x):
    """A prompt column of zeros, then the response `[B]`."""
    return jnp.stack([jnp.zeros_like(x), x], axis=1)


def quantities(logits, action):
    z = logits[STATE]
    return {"log_prob": beside(features.log_prob(z, action)), "entropy": beside(features.entropy(z))}


@functools.partial(jax.jit, static_argnames=("update", "terms", "num_rollouts"))
def train(state, scale, *, update, terms, num_rollouts=600):
    """Two steps of gradient descent on each rollout; `(entropy, side)` at the beginning of each."""
    mask = beside(jnp.ones(NUM_ROWS, bool))

    def rollout(carry, step):
        logits, state = carry
        action = jax.random.categorical(jax.random.fold_in(jax.random.key(1), step), logits[STATE]).astype(jnp.int32)
        reward = scale * jnp.asarray(REWARD)[STATE, action]
        mean = jax.ops.segment_sum(reward, STATE, num_segments=NUM_STATES) * (NUM_STATES / NUM_ROWS)
        batch = toy.rollouts(mask, logp_old=quantities(logits, action)["log_prob"])
        before, sides = jnp.mean(features.entropy(logits)), []
        for index in range(2):
            scored = toy.signals(batch, **quantities(logits, action))
            scored = scored.replace(step=step, update_index=jnp.int32(index))
            plan = initial_plan(batch, beside(reward - mean[STATE]))
            plan, state = update(plan, state, scored, jax.random.key(0))
            weight = plan.pg_weight * normalisers.token_mean(plan.counted, batch)
            sides.append(plan.metrics["entropy_band/below"][0] - plan.metrics["entropy_band/above"][0])

            def loss(logits, plan=plan, weight=weight):
                q = quantities(logits, action)
                parts = [jnp.sum(plan.terms[name] * term(q, plan, batch)) for name, term in terms]
                return jnp.sum(weight * surrogates.ratio(q, plan, batch)[0]) + sum(parts)

            logits = logits - 0.1 * jax.grad(loss)(logits)
        return (logits, state), (before, sides[0])

    steps = jnp.arange(num_rollouts, dtype=jnp.int32)
    _, (entropy, side) = jax.lax.scan(rollout, (jnp.asarray(REWARD), state), steps)
    return entropy, side


def trained(*, scale, bonus, bound):
    """Entropies and sides over 600 rollouts; the guard's bound 0 leaves it out."""
    band = entropy_band(
        entropy_low=LOW, entropy_high=HIGH, margin=MARGIN, entropy_coef_delta=0.03, entropy_coef_max=bound
    )
    method = chain(clip=clip_range(), bonus=entropy_bonus(entropy_coef=bonus), band=band)
    found = train(method.init(), scale, update=method.update, terms=tuple(method.terms.items()))
    return [np.asarray(x) for x in found]


def test_a_strong_reward_does_not_collapse_the_policy():
    free, _ = trained(scale=1.0, bonus=0.0, bound=0.0)
    assert HIGH < free[0] and free[-1] < 0.35
    held, side = trained(scale=1.0, bonus=0.0, bound=1.0)
    settled = held[SETTLED:]
    assert LOW - MARGIN < settled.min() and settled.max() < HIGH
    assert 0.2 < np.mean(side[SETTLED:] > 0) < 0.9 and not np.any(side[SETTLED:] < 0)


def test_a_large_bonus_does_not_explode_the_policy():
    free, _ = trained(scale=0.2, bonus=0.5, bound=0.0)
    assert free[-1] > 1.95  # of log 8 = 2.08
    held, side = trained(scale=0.2, bonus=0.5, bound=1.0)
    settled = held[SETTLED:]
    assert LOW < settled.min() and settled.max() < HIGH + MARGIN
    assert 0.2 < np.mean(side[SETTLED:] < 0) < 0.9 and not np.any(side[SETTLED:] > 0)


def test_a_policy_inside_its_band_is_left_alone():
    free, _ = trained(scale=0.0, bonus=0.0, bound=0.0)
    assert LOW < free[0] - 0.5  # it begins above the band and nothing else moves it
    held, side = trained(scale=0.0, bonus=0.0, bound=1.0)
    inside = np.nonzero(held < HIGH - MARGIN)[0][0]
    assert np.all(side[:inside] == -1.0) and not np.any(side[inside:])
    np.testing.assert_allclose(held[-100:], held[-1], atol=1e-4)
    assert LOW < held[-1] < HIGH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_low": -0.1}, r"entropy_low must be finite and at least 0, got -0\.1"),
        ({"entropy_low": float("inf")}, "entropy_low must be finite"),
        ({"entropy_low": 1.0}, r"entropy_high must be above entropy_low = 1\.0, got 1\.0"),
        ({"entropy_high": float("nan")}, "entropy_high must be above entropy_low = 0.2, got nan"),
        ({"margin": -0.1}, r"margin must be in \[0, 0\.4\], half of the band, got -0\.1"),
        ({"margin": 0.5}, r"margin must be in \[0, 0\.4\], half of the band, got 0\.5"),
        ({"entropy_coef_delta": -1e-3}, r"entropy_coef_delta must be finite and at least 0, got -0\.001"),
        ({"entropy_coef_return": float("inf")}, "entropy_coef_return must be finite and at least 0, got inf"),
        ({"entropy_coef_max": -1.0}, r"entropy_coef_max must be finite and at least 0, got -1\.0"),
        ({"entropy_coef_max": float("inf")}, "entropy_coef_max must be finite and at least 0, got inf"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        entropy_band(**options)

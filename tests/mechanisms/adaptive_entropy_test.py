"""The adaptive entropy coefficient: the controller's rules, when it moves, and what the loss gets."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy import normalisers
from jentropy.base import ENTROPY, initial_plan
from jentropy.mechanisms import adaptive_entropy as module
from jentropy.mechanisms.adaptive_entropy import adaptive_entropy

BATCH = toy.rollouts([[True, True]], logp_old=[[-0.25, -0.75]])
NUMBERS = {"entropy_target": 0.5, "entropy_coef_delta": 0.25, "entropy_coef_max": 0.625, "entropy_coef_init": 0.25}
RULES = {"skywork": module.skywork, "trl": module.trl}


def signals(entropy, step, index=0):
    """One update of the rollout `step`, both of whose tokens have this entropy."""
    scored = toy.signals(BATCH, log_prob=jnp.zeros((1, 2)), entropy=jnp.full((1, 2), entropy))
    return scored.replace(step=jnp.int32(step), update_index=jnp.int32(index))


def run(mechanism, updates, state=None):
    """The coefficients applied in updates `(entropy, step)`, one after the other, and the last state."""
    state, applied = mechanism.init() if state is None else state, []
    update = jax.jit(mechanism.update)
    for entropy, step in updates:
        plan = initial_plan(BATCH, jnp.zeros((1, 2)))
        plan, state = update(plan, state, signals(entropy, step), jax.random.key(0))
        applied.append(float(plan.metrics["actor/entropy_coef"][0]))
        np.testing.assert_array_equal(plan.terms["entropy"], np.full((1, 2), -applied[-1] / 2))
    return applied, state


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("skywork", [0.25, 0.5, 0.625, 0.0, 0.0, 0.0, 0.25]), ("trl", [0.0, 0.5, 0.625, 0.625, 0.0, 0.0, 0.375])],
)
def test_by_hand(rule, expected):
    # An entropy at the target, 0.5, is not below it for Skywork and is for TRL.
    entropies = [0.25, 0.25, 0.5, 0.75, 2.0, 0.25, 0.0]
    applied, state = run(adaptive_entropy(rule=rule, **NUMBERS), [(e, k) for k, e in enumerate(entropies)])
    assert applied == expected
    assert state.step == 6 and state.num_tokens == 2.0


def test_the_coefficient_falls_while_it_is_not_applied():
    state = adaptive_entropy(**NUMBERS).init()
    after = module.skywork(state, jnp.float32(0.75))
    assert (float(after.coef), bool(after.enabled)) == (0.0, False)
    assert float(module.skywork(after, jnp.float32(0.75)).coef) == 0.0


def test_all_updates_of_a_rollout_share_a_coefficient_and_are_what_the_controller_sees():
    mechanism = adaptive_entropy(**NUMBERS)
    applied, _ = run(mechanism, [(0.25, 0), (0.5, 0), (0.625, 0), (9.0, 1), (9.0, 1), (0.0, 2)])
    assert applied == [0.25, 0.25, 0.25, 0.5, 0.5, 0.0]  # mean entropy .458 of rollout 0, 9 of rollout 1
    applied, _ = run(mechanism, [(0.25, 0), (0.5, 0), (0.875, 0), (9.0, 1)])
    assert applied[3] == 0.0  # .542


def test_a_skipped_update_does_not_lose_the_move():
    # The step keeps the state from before an update that it skips.
    mechanism = adaptive_entropy(**NUMBERS)
    _, before = run(mechanism, [(0.25, 0)])
    for skipped in (0, 1, 2):
        lost, _ = run(mechanism, [(0.25, 1)] * skipped, before)
        kept, after = run(mechanism, [(0.25, 1)], before)
        assert [*lost, *kept] == [0.5] * (skipped + 1)
        assert float(after.coef) == 0.5
    assert run(mechanism, [(0.25, 2)], before)[0] == [0.5]  # no update of rollout 1 was seen


def test_a_run_may_begin_at_any_rollout():
    assert run(adaptive_entropy(**NUMBERS), [(0.25, 7), (0.25, 8)])[0] == [0.25, 0.5]


def test_the_sampled_estimate():
    mechanism = adaptive_entropy(entropy_estimate="sampled", **NUMBERS)
    applied, state = run(mechanism, [(9.0, 0), (9.0, 1)])  # -logp_old is 0.5 on average
    assert applied == [0.25, 0.0] and float(state.entropy_sum) == 1.0
    mechanism = adaptive_entropy(entropy_estimate="sampled", rule="trl", **NUMBERS)
    assert run(mechanism, [(9.0, 0), (9.0, 1)])[0] == [0.0, 0.5]


def test_the_first_rollout_sets_the_target():
    mechanism = adaptive_entropy(**{**NUMBERS, "entropy_target": "first_batch"}, target_fraction=0.5)
    applied, state = run(mechanism, [(1.0, 0), (2.0, 0), (0.5, 1), (0.625, 2), (0.875, 3), (0.0, 4)])
    assert float(state.entropy_target) == 0.75
    assert applied == [0.25, 0.25, 0.0, 0.25, 0.5, 0.0]


def test_normaliser_and_tokens_without_policy_gradient():
    batch, scored, advantage = toy.random_batch(fill=np.nan)
    mechanism = adaptive_entropy(normaliser=normalisers.sequence_mean_token_mean, **NUMBERS)
    plan = initial_plan(batch, advantage)
    plan = toy.update(mechanism, scored, advantage, plan=plan.replace(counted=jnp.zeros_like(plan.counted)))
    weight = normalisers.sequence_mean_token_mean(batch.loss_mask, batch)
    np.testing.assert_allclose(plan.terms["entropy"], -0.25 * weight, rtol=1e-6)
    mask = np.asarray(batch.loss_mask)
    total, count = plan.metrics["adaptive_entropy/entropy"]
    np.testing.assert_allclose(total, np.asarray(scored.scores["entropy"])[mask].sum(), rtol=1e-6)
    assert count == mask.sum() and plan.metrics["adaptive_entropy/coef"] == (0.25, 1.0)
    assert mechanism.outputs == (ENTROPY,)
    np.testing.assert_array_equal(mechanism.terms["entropy"](scored.scores, plan, batch), scored.scores["entropy"])


@pytest.mark.parametrize("rule", ["skywork", "trl"])
def test_garbage_outside_the_mask_does_not_matter(rule):
    for estimate in ("full", "sampled"):
        mechanism = adaptive_entropy(rule=rule, entropy_estimate=estimate, **NUMBERS)
        clean, dirty = (toy.update(mechanism, *toy.random_batch(fill=fill)[1:]) for fill in (0.0, np.nan))
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_an_empty_update_moves_nothing():
    mechanism = adaptive_entropy(**NUMBERS)
    empty = signals(jnp.nan, 0).replace(batch=BATCH.replace(loss_mask=jnp.zeros((1, 2), bool)))
    plan, state = mechanism.update(initial_plan(BATCH, jnp.zeros((1, 2))), mechanism.init(), empty, None)
    assert not np.any(plan.terms["entropy"])
    applied, state = run(mechanism, [(0.25, 1)], state)
    assert applied == [0.25] and float(state.coef) == 0.25


def test_a_maximum_of_0_is_neutral():
    mechanism = adaptive_entropy(entropy_coef_max=0.0, entropy_target=9.0)
    assert run(mechanism, [(0.0, k) for k in range(3)])[0] == [0.0] * 3


controllers = st.fixed_dictionaries(
    {"entropy_target": st.floats(0, 3), "entropy_coef_delta": st.floats(0, 0.1), "entropy_coef_max": st.floats(0.02, 1)}
)
entropies = st.lists(st.floats(0, 5), min_size=1, max_size=12)
step = {rule: jax.jit(function) for rule, function in RULES.items()}


@pytest.mark.parametrize("rule", ["skywork", "trl"])
@settings(derandomize=True, deadline=None, max_examples=50)
@given(controllers, entropies)
def test_the_coefficient_stays_in_its_bounds(rule, numbers, entropies):
    state = adaptive_entropy(entropy_coef_min=0.01, entropy_coef_init=0.015, rule=rule, **numbers).init()
    for entropy in entropies:
        before, state = float(state.coef), step[rule](state, jnp.float32(entropy))
        assert state.entropy_coef_min <= state.coef <= state.entropy_coef_max
        assert abs(float(state.coef) - before) <= numbers["entropy_coef_delta"] * 1.0001 + 1e-7


@pytest.mark.parametrize("rule", ["skywork", "trl"])
@settings(derandomize=True, deadline=None, max_examples=50)
@given(controllers, entropies, st.floats(0, 5), st.floats(0, 5))
def test_a_lower_entropy_never_gives_a_smaller_coefficient(rule, numbers, entropies, one, other):
    state = adaptive_entropy(rule=rule, **numbers).init()
    for entropy in entropies:
        state = step[rule](state, jnp.float32(entropy))
    low, high = (step[rule](state, jnp.float32(e)) for e in sorted((one, other)))
    assert low.coef >= high.coef and low.enabled >= high.enabled


def test_the_state_survives_saving_bit_for_bit():
    mechanism = adaptive_entropy(entropy_target="first_batch", entropy_coef_delta=0.003, entropy_coef_max=0.1)
    rng = np.random.default_rng(0)
    updates = [(float(e), k // 3) for k, e in enumerate(rng.exponential(size=24))]
    whole, last = run(mechanism, updates)
    first, state = run(mechanism, updates[:10])  # in the middle of rollout 3
    file = io.BytesIO()
    np.savez(file, **{name: np.asarray(x) for name, x in state._asdict().items()})
    file.seek(0)
    loaded = module.AdaptiveEntropyState(**{name: jnp.asarray(x) for name, x in np.load(file).items()})
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    rest, end = run(mechanism, updates[10:], loaded)
    assert first + rest == whole
    jax.tree.map(np.testing.assert_array_equal, end, last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_target": -0.1}, r"entropy_target must be finite and at least 0, or 'first_batch', got -0\.1"),
        ({"entropy_target": float("inf")}, "entropy_target must be finite"),
        ({"entropy_target": "first"}, "entropy_target must be finite and at least 0, or 'first_batch', got 'first'"),
        ({"target_fraction": 0.0}, r"target_fraction must be finite and above 0, got 0\.0"),
        ({"entropy_coef_delta": -1e-3}, r"entropy_coef_delta must be finite and at least 0, got -0\.001"),
        ({"entropy_coef_min": -1.0}, r"entropy_coef_min must be at least 0, got -1\.0"),
        (
            {"entropy_coef_max": -1.0},
            r"entropy_coef_max must be finite and at least entropy_coef_min = 0\.0, got -1\.0",
        ),
        ({"entropy_coef_max": float("inf")}, "entropy_coef_max must be finite and at least"),
        ({"entropy_coef_init": 0.1}, r"entropy_coef_init must be in \[0\.0, 0\.005\], got 0\.1"),
        ({"rule": "pid"}, r"rule must be one of \['skywork', 'trl'\], got 'pid'"),
        ({"entropy_estimate": "top"}, "entropy_estimate must be full or sampled, got 'top'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        adaptive_entropy(**options)

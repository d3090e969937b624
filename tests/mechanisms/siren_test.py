"""SIREN: peaks of each row, the anchor, the linearised square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import compose, surrogates
from jentropy.advantages.reinforce import reinforce
from jentropy.base import Objective, Output, initial_plan
from jentropy.mechanisms.siren import peaks, siren
from jentropy.normalisers import token_mean
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.stats import fraction_parts
from jentropy.train.optimizer import AdamW
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.state import new_stage
from jentropy.train.step import make_spec, make_train_step

NAME = "nucleus_entropy(0.8)"


def batch_of(seed=0, fill=0.0, name=NAME, shape=(6, 12)):
    """Ragged rows, one empty, one of a single token, with an entropy on the mask and `fill` elsewhere."""
    rng = np.random.default_rng(seed)
    mask = np.arange(shape[1])[None, :] < rng.integers(2, shape[1] + 1, shape[0])[:, None]
    mask[1], mask[2] = False, np.arange(shape[1]) == 3
    entropy = np.where(mask, rng.exponential(size=shape), fill).astype(np.float32)
    return toy.signals(toy.rollouts(mask, logp_old=np.zeros(shape, np.float32)), **{name: entropy})


@functools.cache
def jitted(update):
    """Equal updates share one compilation."""
    return jax.jit(update)


def steps(mechanism, *signals):
    """Plans of the updates, and the state after the last."""
    update, state, plans = jitted(mechanism.update), mechanism.init(), []
    for x in signals:
        plan, state = update(initial_plan(x.batch, jnp.zeros(x.batch.loss_mask.shape)), state, x, jax.random.key(0))
        plans.append(plan)
    return plans, state


def scaled(signals, factor, name=NAME):
    return signals.replace(scores={name: factor * signals.scores[name]})


def expected_peaks(signals, tau, strict, name=NAME):
    mask, entropy = np.asarray(signals.batch.loss_mask), np.asarray(signals.scores[name], np.float64)
    chosen = np.zeros_like(mask)
    for row, (m, h) in enumerate(zip(mask, entropy)):
        if m.any():
            n, ordered = m.sum(), np.sort(h[m])
            position = round(tau * (n - 1), 9)
            low, high = ordered[int(np.floor(position))], ordered[int(np.ceil(position))]
            quantile = low + (position - np.floor(position)) * (high - low)
            chosen[row] = m & ((h > quantile) if strict else (h >= quantile))
    return chosen


jitted_peaks = jax.jit(peaks, static_argnames="strict")


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("strict", [False, True])
def test_peaks_are_the_quantile_of_each_row(tau, strict):
    for seed in range(3):
        x = batch_of(seed)
        found = jitted_peaks(x.scores[NAME], x.batch.loss_mask, fraction_parts(tau), strict=strict)
        np.testing.assert_array_equal(found, expected_peaks(x, tau, strict))


def test_peaks_by_hand():
    """Position .8 · 5 is the fifth of six; .8 · 3 = 2.4 lies above the third of four."""
    x = jnp.array([[1.0, 2.0, 6.0, 4.0, 5.0, 3.0], [9.0, 7.0, 8.0, 6.0, 0.0, 0.0], [2.0, 2.0, 2.0, 0.0, 0.0, 0.0]])
    mask = jnp.array([[True] * 6, [True] * 4 + [False] * 2, [True] * 3 + [False] * 3])
    at = [[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    above = [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    for strict, expected in ((False, at), (True, above)):
        found = jitted_peaks(x, mask, fraction_parts(0.8), strict=strict)
        np.testing.assert_array_equal(found, np.array(expected, bool))


@pytest.mark.parametrize(("strict", "average"), [(False, "tokens"), (True, "tokens"), (False, "rows"), (True, "rows")])
def test_coefficient_is_the_gradient_of_the_square(strict, average):
    x = batch_of()
    mechanism = siren(tau=0.5, beta=0.3, target=0.7, strict=strict, average=average)
    (plan,), _ = steps(mechanism, x)
    peak, mask, entropy = expected_peaks(x, 0.5, strict), np.asarray(x.batch.loss_mask), np.asarray(x.scores[NAME])

    def penalty(h):
        if average == "tokens":
            estimate = jnp.sum(jnp.where(peak, h, 0.0)) / float(peak.sum())
        else:
            sums, counts = jnp.sum(jnp.where(peak, h, 0.0), axis=1), np.maximum(peak.sum(1), 1.0)
            estimate = jnp.sum(sums / counts) / float(mask.any(1).sum())
        return 0.3 * (estimate - 0.7) ** 2

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(penalty)(jnp.asarray(entropy, np.float64))
    assert set(plan.terms) == {NAME}
    np.testing.assert_allclose(plan.terms[NAME], gradient, rtol=1e-5, atol=1e-9)
    total, count = plan.metrics["actor/penalty"]
    np.testing.assert_allclose((total, count), (value, 1.0), rtol=1e-5)
    assert [float(x) for x in plan.metrics["siren/peak_fraction"]] == [peak.sum(), mask.sum()]


def test_the_first_update_sets_the_anchor():
    mechanism, x = siren(tau=0.5, beta=0.5), batch_of()
    (first, low, high), state = steps(mechanism, x, scaled(x, 0.5), scaled(x, 1.5))
    peak = expected_peaks(x, 0.5, False)
    anchor = np.asarray(x.scores[NAME])[peak].mean()
    np.testing.assert_allclose(state.target, anchor, rtol=1e-6)
    assert not np.any(first.terms[NAME])
    np.testing.assert_allclose(low.terms[NAME], np.where(peak, -0.5 * anchor / peak.sum(), 0.0), rtol=1e-5)
    np.testing.assert_allclose(high.terms[NAME], np.where(peak, 0.5 * anchor / peak.sum(), 0.0), rtol=1e-5)
    for plan, factor in ((first, 1.0), (low, 0.5), (high, 1.5)):
        np.testing.assert_allclose(plan.metrics["siren/entropy"], (factor * anchor, 1.0), rtol=1e-6)
        np.testing.assert_allclose(plan.metrics["siren/target"], (anchor, 1.0), rtol=1e-6)


def test_an_anchor_of_zero_is_an_anchor():
    mechanism, x = siren(beta=0.5), batch_of()
    (_, plan), state = steps(mechanism, scaled(x, 0.0), x)
    assert state.target == 0.0 and state.known
    assert np.all(np.asarray(plan.terms[NAME])[expected_peaks(x, 0.8, False)] > 0.0)


@pytest.mark.parametrize("strict", [False, True])
def test_an_update_without_peaks_does_not_set_the_anchor(strict):
    mechanism, x = siren(beta=0.5, strict=strict), batch_of()
    mask = jnp.zeros_like(x.batch.loss_mask) if not strict else x.batch.loss_mask
    none = x.replace(batch=x.batch.replace(loss_mask=mask), scores={NAME: jnp.ones(mask.shape)})
    (plan,), state = steps(mechanism, none)
    assert not state.known
    assert not np.any(plan.terms[NAME])
    assert all(plan.metrics[name] == (0.0, 0.0) for name in ("siren/entropy", "siren/target", "actor/penalty"))
    _, state = steps(mechanism, none, x)
    np.testing.assert_allclose(state.target, np.asarray(x.scores[NAME])[expected_peaks(x, 0.8, strict)].mean(), 1e-6)


def test_an_update_without_peaks_after_the_anchor_has_no_penalty():
    x = batch_of()
    empty = x.replace(batch=x.batch.replace(loss_mask=jnp.zeros_like(x.batch.loss_mask)))
    (_, plan), state = steps(siren(beta=0.5), x, empty)
    assert not np.any(plan.terms[NAME]) and plan.metrics["actor/penalty"] == (0.0, 0.0)
    assert state.known and state.target > 0.0


def test_one_token_is_a_peak():
    mask = np.arange(4)[None, :] == 2
    x = toy.signals(toy.rollouts(mask), **{NAME: np.where(mask, 0.5, np.nan).astype(np.float32)})
    (plan,), _ = steps(siren(beta=1.0, target=0.25), x)
    np.testing.assert_array_equal(plan.terms[NAME], [[0.0, 0.0, 0.5, 0.0]])
    (plan,), _ = steps(siren(beta=1.0, target=0.25, strict=True), x)
    assert not np.any(plan.terms[NAME])


def test_zero_beta_is_neutral():
    x = batch_of()
    (_, plan), state = steps(siren(beta=0.0), x, scaled(x, 0.5))
    assert not np.any(plan.terms[NAME]) and state.known


def test_garbage_outside_the_mask_does_not_matter():
    run = functools.partial(steps, siren(tau=0.5, target=1.0, average="rows"))
    clean, dirty = run(batch_of()), run(batch_of(fill=np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_per_micro_batch_as_released():
    """Each block has its own mean and its own square; the anchor is one."""
    x = batch_of()
    options = {"tau": 0.5, "beta": 0.3, "target": 0.7, "average": "rows"}
    (plan,), _ = steps(compose.blockwise(siren(**options), rows=3), x)
    for rows in (slice(0, 3), slice(3, 6)):
        part = jax.tree.map(lambda y, rows=rows: y[rows] if y.ndim else y, x)
        (alone,), _ = steps(siren(**options), part)
        np.testing.assert_allclose(plan.terms[NAME][rows], np.asarray(alone.terms[NAME]) / 2.0, rtol=1e-6, atol=1e-9)


def test_outputs():
    assert siren(top_p=0.9).outputs == (Output("nucleus_entropy", 0.9),)
    released = siren(nucleus="released", top_p=1)
    assert released.outputs == (Output("nucleus_entropy_released", 1.0),)
    assert set(released.terms) == {"nucleus_entropy_released(1.0)"}
    chained = compose.chain(a=siren(), b=siren(top_p=0.5))
    assert len(chained.outputs) == len(chained.terms) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1\.1"),
        ({"tau": 1.0}, r"tau must be in \[0, 1\), got 1\.0"),
        ({"tau": -0.1}, r"tau must be in \[0, 1\), got -0\.1"),
        ({"beta": -1.0}, r"beta must be finite and at least 0, got -1\.0"),
        ({"beta": float("inf")}, r"beta must be finite and at least 0, got inf"),
        ({"target": -1.0}, r"target must be None, or finite and at least 0, got -1\.0"),
        ({"nucleus": "full"}, r"nucleus must be one of \['paper', 'released'\], got 'full'"),
        ({"average": "batch"}, r"average must be tokens or rows, got 'batch'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        siren(**options)


def test_a_skipped_step_does_not_set_the_anchor():
    """The real step: a reward that is NaN skips it; the next one sets the anchor, the third is pulled towards it."""
    policy = transformer(
        TransformerConfig(vocab_size=8, width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=8, mlp_width=8)
    )
    mask = np.arange(6)[None, :] >= np.array([1, 2, 3, 1])[:, None]
    rows = toy.rollouts(mask, rewards=np.float32([0, 1, 0, 1]), logp_old=np.zeros(mask.shape, np.float32))
    rows = rows.replace(tokens=jnp.asarray(np.arange(24).reshape(4, 6) % 8, jnp.int32))
    objective = Objective(reinforce(), compose.chain(siren=siren(tau=0.5, beta=10.0)), surrogates.reinforce, token_mean)
    optimizer = AdamW(learning_rate=3e-2)
    step = make_train_step(make_spec(policy, objective, optimizer), 1, make_mesh(MeshShape(), 1))
    state = new_stage(
        jax.jit(policy.init)(jax.random.key(0)), jnp.int32(0), jax.random.key(1), objective, optimizer, False
    )
    targets, distances = [], []
    for bad in (True, False, False, False):
        batch = rows.replace(rewards=jnp.full_like(rows.rewards, jnp.nan)) if bad else rows
        state, metrics = step(state, batch)
        assert metrics["update/skipped"][0] == float(bad)
        anchor = state.mechanism_state["siren"]
        assert bool(anchor.known) != bad
        targets.append(float(anchor.target))
        distances.append(float(metrics["siren/entropy"][0] - metrics["siren/target"][0]))
    assert targets[0] == 0.0 < targets[1] == targets[2] == targets[3] < np.log(8)
    assert distances[:2] == [0.0, 0.0] and distances[2] != 0.0
    np.testing.assert_allclose(metrics["actor/penalty"][0], 10.0 * distances[3] ** 2, rtol=1e-5)

"""Top-entropy: which tokens keep their policy gradient, how many, and what they are divided by."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy import compose, normalisers, stats, surrogates
from jentropy.base import ENTROPY, initial_plan
from jentropy.mechanisms.entropy_bonus import entropy_bonus
from jentropy.mechanisms.top_entropy import num_selected, top_entropy


def kept(signals, *, key=0, **options):
    advantage = jnp.ones(signals.batch.loss_mask.shape)
    return np.asarray(toy.update(top_entropy(**options), signals, advantage, key=key).pg_weight > 0.0)


def by_loop(entropy, mask, fraction, scope, rule, row_id):
    """An explicit sort of every scope's tokens by (-entropy, row_id, column)."""
    tokens = [(-entropy[b, t], row_id[b], t, b) for b, t in np.argwhere(mask)]
    parts = [tokens] if scope == "batch" else [[x for x in tokens if x[3] == b] for b in range(len(mask))]
    expected = np.zeros(mask.shape, bool)
    for part in (sorted(p) for p in parts if p):
        if rule == "topk":
            count = max(1, math.floor(Fraction(str(fraction)) * len(part) + Fraction("0.9999")))
            chosen = part[:count]
        else:
            count = math.floor(Fraction(str(fraction)) * (len(part) - 1)) + 1
            chosen = [x for x in part if x[0] <= part[count - 1][0]]
        for _, _, t, b in chosen:
            expected[b, t] = True
    return expected


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("rule", ["topk", "quantile"])
@pytest.mark.parametrize("num_values", [3, 1000])
def test_against_sorting(scope, rule, num_values):
    rng = np.random.default_rng(0)
    mask = rng.random((7, 9)) < 0.6
    mask[3], mask[5] = False, np.arange(9) == 4
    row_id = rng.permutation(20)[:7].astype(np.int32)
    entropy = rng.integers(0, num_values, mask.shape).astype(np.float32) / 8
    batch = toy.rollouts(mask, row_id=row_id)
    signals = toy.signals(batch, log_prob=entropy, entropy=np.where(mask, entropy, np.nan))
    for fraction in (0.001, 0.2, 0.29, 0.5, 0.9, 1.0):
        found = kept(signals, top_entropy_quantile=fraction, scope=scope, rule=rule)
        np.testing.assert_array_equal(found, by_loop(entropy, mask, fraction, scope, rule, row_id))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 2**31 - 1), st.sampled_from([1e-8, 1e-4, 0.0001, 0.03, 0.1, 0.2, 0.29, 1 / 3, 0.5, 0.9999, 1.0]))
def test_number_of_tokens_is_exact(count, fraction):
    exact = Fraction(1, 3) if fraction == 1 / 3 else Fraction(str(fraction))
    expected = max(1, math.floor(exact * count + Fraction("0.9999")))
    found = jax.jit(num_selected)(jnp.int32(count), stats.fraction_parts(fraction))
    assert int(found) == expected
    if count < 2**20:  # beyond that the rounding of the released code's float64 shows
        assert expected == max(1, int(count * fraction + 0.9999))


def test_number_of_tokens_of_an_empty_batch_is_0():
    assert int(num_selected(jnp.int32(0), stats.fraction_parts(0.2))) == 0


def test_by_hand():
    batch = toy.rollouts([[True, True, True], [True, True, False]])
    signals = toy.signals(batch, log_prob=np.zeros((2, 3)), entropy=[[0.5, 2.0, 0.25], [1.0, 0.75, 9.0]])
    plan = toy.update(top_entropy(top_entropy_quantile=0.4), signals, jnp.ones((2, 3)))
    np.testing.assert_array_equal(plan.pg_weight, [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(plan.counted, batch.loss_mask)
    assert plan.metrics["top_entropy/selected_fraction"] == (2.0, 5.0)
    assert plan.metrics["top_entropy/selected_entropy"] == (3.0, 2.0)
    assert top_entropy().outputs == (ENTROPY,)


def test_what_the_loss_is_divided_by():
    batch, signals, advantage = toy.random_batch()
    num_tokens = int(batch.loss_mask.sum())
    count = math.ceil(0.2 * num_tokens)
    values = {}
    for denominator in ("all", "selected"):
        plan = toy.update(top_entropy(denominator=denominator), signals, advantage)
        assert int(plan.counted.sum()) == (num_tokens if denominator == "all" else count)
        value, gradient, _ = toy.loss_and_gradient(
            plan, signals, surrogate=surrogates.ratio, normaliser=normalisers.token_mean
        )
        values[denominator] = value
        np.testing.assert_array_equal(gradient != 0.0, plan.pg_weight > 0.0)
    np.testing.assert_allclose(values["selected"] * count, values["all"] * num_tokens, rtol=1e-6)


def test_what_was_taken_away_before_stays_away():
    batch, signals, advantage = toy.random_batch()
    before = initial_plan(batch, advantage)
    first_column = jnp.zeros_like(batch.loss_mask).at[:, 0].set(True)
    before = before.replace(
        counted=before.counted & ~first_column, pg_weight=jnp.where(first_column, 0.0, 0.5 * before.pg_weight)
    )
    mechanism = top_entropy(top_entropy_quantile=0.5, denominator="selected")
    plan = toy.update(mechanism, signals, advantage, plan=before)
    chosen = kept(signals, top_entropy_quantile=0.5)
    np.testing.assert_array_equal(plan.pg_weight, np.where(chosen & ~first_column, 0.5, 0.0))
    np.testing.assert_array_equal(plan.counted, chosen & ~first_column)


def test_terms_keep_all_tokens():
    batch, signals, advantage = toy.random_batch()
    chain = compose.chain(top=top_entropy(denominator="selected"), bonus=entropy_bonus(entropy_coef=1.0))
    np.testing.assert_array_equal(toy.update(chain, signals, advantage).terms["entropy"] < 0.0, batch.loss_mask)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_all_equal(scope):
    batch, signals, _ = toy.random_batch()
    mask = np.asarray(batch.loss_mask)
    signals = signals.replace(scores={**signals.scores, "entropy": jnp.full(mask.shape, 0.7)})
    np.testing.assert_array_equal(kept(signals, scope=scope, rule="quantile"), mask)
    found = kept(signals, scope=scope)
    lengths = mask.sum(axis=1)
    if scope == "batch":
        expected = mask & (np.cumsum(mask).reshape(mask.shape) <= math.ceil(0.2 * mask.sum()))
    else:
        expected = mask & (np.cumsum(mask, axis=1) <= np.ceil(0.2 * lengths)[:, None])
    np.testing.assert_array_equal(found, expected)


OPTIONS = [{"scope": scope, "rule": rule} for scope in ("batch", "sequence") for rule in ("topk", "quantile")]


@pytest.mark.parametrize("options", OPTIONS)
def test_one_is_the_identity_and_an_empty_batch_selects_nothing(options):
    batch, signals, advantage = toy.random_batch()
    plan = toy.update(top_entropy(top_entropy_quantile=1.0, denominator="selected", **options), signals, advantage)
    jax.tree.map(np.testing.assert_array_equal, plan.replace(metrics={}), initial_plan(batch, advantage))
    empty = signals.replace(batch=batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask)))
    plan = toy.update(top_entropy(**options), empty, advantage)
    assert not np.any(plan.pg_weight)
    assert plan.metrics["top_entropy/selected_entropy"] == (0.0, 0.0)


@pytest.mark.parametrize("options", OPTIONS)
def test_garbage_outside_the_mask_does_not_matter(options):
    mechanism = top_entropy(**options)
    clean, dirty = (toy.update(mechanism, *toy.random_batch(fill=fill)[1:]) for fill in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_entropy_quantile": 0.0}, r"top_entropy_quantile must be in \(0, 1\], got 0\.0"),
        ({"top_entropy_quantile": 1.1}, r"top_entropy_quantile must be in \(0, 1\], got 1\.1"),
        ({"top_entropy_quantile": float("nan")}, r"top_entropy_quantile must be in \(0, 1\], got nan"),
        ({"denominator": "some"}, "denominator must be all or selected, got 'some'"),
        ({"scope": "row"}, "scope must be batch or sequence, got 'row'"),
        ({"rule": "top"}, "rule must be topk or quantile, got 'top'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        top_entropy(**options)

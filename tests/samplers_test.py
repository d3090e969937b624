"""Samplers: the sets that truncation keeps, temperatures by entropy, E3's controller against its released code."""

import functools
import json
import math
import re

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jentropy import samplers
from jentropy.samplers import (
    Statistics,
    combine,
    e3_temperature,
    entropy_temperature,
    linear_entropy_temperature,
    plain,
    top_k,
    top_p,
)

INF = float("inf")
FACTORIES = {
    "top_k": (top_k(k=3), top_k(k=7)),
    "top_p": (top_p(p=0.3), top_p(p=1.0)),
    "threshold": (
        entropy_temperature(high=1.2, low=0.9, threshold=0.5),
        entropy_temperature(high=1, low=2, threshold=0),
    ),
    "linear": (
        linear_entropy_temperature(slope=0.1, centre=1.0, low=0.5, high=2.0),
        linear_entropy_temperature(slope=-0.3, centre=0.0, low=0.1, high=9.0),
    ),
    "e3": (e3_temperature(vocab_size=16), e3_temperature(vocab_size=99, target=0.3, num_steps=9, low=None, high=None)),
    "combined": (
        combine(e3=e3_temperature(vocab_size=16), p=top_p(p=0.9), k=top_k(k=3)),
        combine(e3=e3_temperature(vocab_size=20), p=top_p(p=0.5), k=top_k(k=5)),
    ),
}


@pytest.mark.parametrize("name", list(FACTORIES))
def test_settings_share_a_compilation(name):
    one, other = FACTORIES[name]
    assert samplers.compiled_part(one) == samplers.compiled_part(other) != plain()
    assert hash(samplers.compiled_part(one)) == hash(samplers.compiled_part(other))
    assert jax.tree.map(jnp.shape, one.init()) == jax.tree.map(jnp.shape, other.init())
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(one.init()), jax.tree.leaves(other.init())))


@pytest.mark.parametrize("name", list(FACTORIES))
def test_the_state_keeps_its_structure(name):
    sampler = FACTORIES[name][0]
    state = sampler.init()
    after = jax.jit(sampler.advance)(state, Statistics(jnp.float32(0.5), jnp.float32(1.0)))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state)):
        assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, old.weak_type)


# Truncation.


def logits_with_ties(rows=40, size=17):
    rng = np.random.default_rng(0)
    coarse, fine = rng.integers(-3, 4, (rows, size)) / 2, rng.normal(size=(rows, size))
    logits = np.where(rng.random((rows, size)) < 0.5, coarse, fine)
    logits[rng.random((rows, size)) < 0.2] = -np.inf
    logits[0], logits[1, 1:], logits[1, 0] = 0.0, -np.inf, 1.0
    logits[:, 2] = np.where(np.isinf(logits).all(1), 0.0, logits[:, 2])
    return jnp.asarray(logits, jnp.float32)


def kept_by_hand(row, is_enough):
    """The most probable entries, those tied with the last one included, until `is_enough(number, mass)`."""
    probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    order = [i for i in np.argsort(-row, kind="stable") if row[i] != -np.inf]
    chosen = []
    while order and not is_enough(len(chosen), probability[chosen].sum()):
        ties = [i for i in order if row[i] == row[order[0]]]
        chosen, order = chosen + ties, order[len(ties) :]
    return np.isin(np.arange(len(row)), chosen)


@pytest.mark.parametrize("k", [1, 2, 5, 17, 1000])
def test_top_k_keeps_the_k_largest_and_ties(k):
    logits = logits_with_ties()
    kept = np.asarray(jax.jit(top_k(k=k).keep)(logits, top_k(k=k).init()))
    for row, found in zip(np.asarray(logits, np.float64), kept):
        np.testing.assert_array_equal(found, kept_by_hand(row, lambda number, mass: number >= k))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_of_that_mass(p):
    logits = logits_with_ties()
    kept = np.asarray(jax.jit(top_p(p=p).keep)(logits, top_p(p=p).init()))
    for row, found in zip(np.asarray(logits, np.float64), kept):
        np.testing.assert_array_equal(found, kept_by_hand(row, lambda number, mass: mass >= p))


def test_p_of_one_keeps_every_token_however_improbable():
    logits = jnp.array([[0.0, -80.0, -np.inf, 30.0]])
    np.testing.assert_array_equal(top_p(p=1.0).keep(logits, top_p(p=1.0).init()), [[True, True, False, True]])


def test_truncations_follow_one_another():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    both = combine(k=top_k(k=2), p=top_p(p=0.5))  # of the renormalised two, 4/7 and 3/7, the first is enough
    np.testing.assert_array_equal(both.keep(logits, both.init()), [[True, False, False, False]])
    other = combine(p=top_p(p=0.5), k=top_k(k=2))
    np.testing.assert_array_equal(other.keep(logits, other.init()), [[True, True, False, False]])


# Temperatures.

ROWS = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-30, 1e-30], [1.0, 1e-30, 1e-30, 1e-30]]))
"""Entropies of ln 4, ln 2 and 0 nats."""


def test_two_temperatures_by_hand():
    sampler = entropy_temperature(high=1.5, low=0.5, threshold=0.6)
    found = sampler.temperature(ROWS, sampler.init(), jnp.float32(3.0))
    np.testing.assert_array_equal(found, np.float32([1.5, 1.5, 0.5]))
    at_the_threshold = entropy_temperature(high=1.5, low=0.5, threshold=0.0)
    found = at_the_threshold.temperature(ROWS, at_the_threshold.init(), jnp.float32(3.0))
    np.testing.assert_array_equal(found, [1.5] * 3)


def test_the_linear_temperature_by_hand():
    sampler = linear_entropy_temperature(slope=0.5, centre=math.log(2), low=0.7, high=1.3)
    found = sampler.temperature(ROWS, sampler.init(), jnp.float32(1.0))
    np.testing.assert_allclose(found, [1.3, 1.0, 0.7], rtol=1e-6)
    wide = linear_entropy_temperature(slope=-0.5, centre=math.log(2), low=0.1, high=3.0)
    found = wide.temperature(ROWS, wide.init(), jnp.float32(1.0))
    np.testing.assert_allclose(found, [1 - math.log(2) / 2, 1.0, 1 + math.log(2) / 2], rtol=1e-6)


def test_tokens_that_cannot_be_drawn_have_no_entropy():
    barred = jnp.where(jnp.arange(4)[None, :] < 2, ROWS[:1], -jnp.inf)  # ln 2 is left
    sampler = entropy_temperature(high=1.5, low=0.5, threshold=0.7)
    np.testing.assert_array_equal(sampler.temperature(barred, sampler.init(), jnp.float32(1.0)), [0.5])


def test_combine_has_one_temperature_and_every_state():
    sampler = combine(p=top_p(p=0.9), entropy=entropy_temperature(high=1.5, low=0.5, threshold=0.6))
    assert set(sampler.init()) == {"p", "entropy"}
    found = sampler.temperature(ROWS, sampler.init(), jnp.float32(1.0))
    np.testing.assert_array_equal(found, np.float32([1.5, 1.5, 0.5]))
    assert combine().temperature is None is combine().keep and combine().init() == {}
    with pytest.raises(ValueError, match=r"samplers must be at most one that sets the temperature, got \['a', 'b'\]"):
        combine(a=e3_temperature(vocab_size=9), p=top_p(p=0.5), b=entropy_temperature(high=1, low=1, threshold=0))


# E3.


@functools.cache
def _jitted(function):
    return jax.jit(function)


def e3_series(entropies, initial, **settings):
    """The temperature before each rollout, the first one's included."""
    sampler = e3_temperature(**settings)
    state, found = sampler.init(), [initial]
    dtype = jnp.result_type(float)
    for entropy in entropies:
        statistics = Statistics(jnp.asarray(entropy, dtype), jnp.asarray(initial, dtype))
        state = _jitted(sampler.advance)(state, statistics)
        found.append(float(state.temperature))
    return np.asarray(found)


def e3_by_hand(entropies, temperature, *, vocab_size, target=None, init_steps=1, num_steps=None, ratio=0.4, final=0.9):
    """The rule as a Python loop: updates before annealing, which changes the target of the next one."""
    scale = math.log(vocab_size) + math.log(math.log(vocab_size))
    begin = num_steps - int(num_steps * ratio) if int((num_steps or 0) * ratio) else INF
    found, current, first = [temperature], target, target
    for step, entropy in enumerate(entropies, start=1):
        if step > init_steps:
            if current is None:
                current = first = sum(entropies[:init_steps]) / init_steps
            temperature *= 1 + temperature * math.log(current / entropy) / scale
            if step >= begin:
                decay = 0.5 * (1 + math.cos(math.pi * min((step - begin) / (num_steps - begin), 1.0)))
                current = first * ((1 - final) * decay + final)
        found.append(temperature)
    return found


ENTROPIES = 0.7 + 0.1 * np.sin(np.arange(14.0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": 0.6},
        {"init_steps": 3},
        {"num_steps": 10},
        {"num_steps": 12, "target": 0.8, "ratio": 0.9, "final": 0.5, "init_steps": 2},
        {"num_steps": 5, "ratio": 0.1},
    ],
)
def test_e3_is_the_loop(options):
    options = {"vocab_size": 16, **options}
    wanted = e3_by_hand(ENTROPIES, 0.8, **options)
    renamed = {"ratio": "annealing_ratio", "final": "annealing_factor"}
    options = {renamed.get(name, name): value for name, value in options.items()}
    with jax.enable_x64(True):
        found = e3_series(ENTROPIES, 0.8, **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


def test_e3_by_hand():
    found = e3_series([0.5, 0.25, 0.5], 1.0, vocab_size=16)
    second = 1 + math.log(2) / (math.log(16) + math.log(math.log(16)))
    np.testing.assert_allclose(found, [1.0, 1.0, second, second], rtol=1e-6)


def test_e3_keeps_to_its_bounds():
    found = e3_series([0.5] + [1e-9] * 5 + [50.0] * 5, 1.0, vocab_size=16, low=0.6, high=1.5)
    np.testing.assert_array_equal(found[2:], np.float32([1.5] * 5 + [0.6] * 5))
    assert found[:2].tolist() == [1.0, 1.0]


def test_e3_survives_an_entropy_of_zero():
    assert np.isfinite(e3_series([0.5, 0.0, 0.0, 0.5], 1.0, vocab_size=16)).all()
    assert e3_series([0.0, 0.0, 0.0], 1.0, vocab_size=16).tolist() == [1.0] * 4
    assert e3_series([0.5, 0.0], 1.0, vocab_size=16, min_entropy=0.0, high=None)[-1] == np.inf


def test_e3_is_one_temperature_for_all_tokens():
    sampler = e3_temperature(vocab_size=4)
    state = sampler.init()
    np.testing.assert_array_equal(sampler.temperature(ROWS, state, jnp.float32(0.7)), np.float32([0.7] * 3))
    for entropy in (0.5, 0.25):
        state = sampler.advance(state, Statistics(jnp.float32(entropy), jnp.float32(0.7)))
    found = sampler.temperature(ROWS, state, jnp.float32(0.7))
    np.testing.assert_array_equal(found, [float(state.temperature)] * 3)
    assert found[0] > 0.7


def check_e3(golden, precision):
    """The released class has no bounds: its temperature grows without limit once the entropy does not follow it."""
    del precision
    stored = json.loads(str(golden["hparams"])) if "hparams" in golden else {}
    entropies = golden["entropy_seq"]
    series = [name for name in golden if name.startswith("T_")]
    assert series
    for name in series:
        target = re.search(r"target([\d.]+\d)", name)
        settings = {
            "vocab_size": stored.get("vocab_size", 151_936),
            "target": float(target[1]) if target else stored.get("target_entropy"),
            "init_steps": stored.get("init_steps", 1),
            "num_steps": stored.get("max_steps", len(entropies)) if "anneal" in name else None,
            "annealing_ratio": stored.get("annealing_ratio", 0.4),
            "annealing_factor": stored.get("annealing_factor", 0.9),
        }
        unbounded = {"low": None, "high": None, "min_entropy": 0.0}
        found = e3_series(entropies, float(golden[name][0]), **settings, **unbounded)
        golden_cases.close(found, golden[name], golden_cases.TOLERANCE["f64"])
        bounded = e3_series(entropies, float(golden[name][0]), **settings)
        assert bounded.min() >= 0.5 and bounded.max() <= 2.0


test_released_code = golden_cases.make_test({"entropy_e3_temperature*.npz": (check_e3, golden_cases.DOUBLE)})


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (top_k, {"k": 0}, "k must be at least 1 and an int32, got 0"),
        (top_p, {"p": 0.0}, r"p must be in \(0, 1\], got 0\.0"),
        (top_p, {"p": 1.1}, r"p must be in \(0, 1\], got 1\.1"),
        (entropy_temperature, {"high": 0.0}, r"high must be positive and finite, got 0\.0"),
        (entropy_temperature, {"low": INF}, "low must be positive and finite, got inf"),
        (entropy_temperature, {"threshold": -1.0}, r"threshold must be finite and at least 0, got -1\.0"),
        (linear_entropy_temperature, {"slope": INF}, "slope must be finite, got inf"),
        (linear_entropy_temperature, {"centre": -0.1}, r"centre must be finite and at least 0, got -0\.1"),
        (linear_entropy_temperature, {"low": 3.0}, r"low must be at most high = 2\.0, got 3\.0"),
        (linear_entropy_temperature, {"low": 0.0}, r"low must be positive and finite, got 0\.0"),
        (e3_temperature, {"vocab_size": 2}, "vocab_size must be at least 3, got 2"),
        (e3_temperature, {"target": 0.0}, r"target must be positive and finite, or None, got 0\.0"),
        (e3_temperature, {"init_steps": 0}, "init_steps must be at least 1, got 0"),
        (e3_temperature, {"num_steps": 0}, "num_steps must be at least 1, or None, got 0"),
        (e3_temperature, {"annealing_ratio": 1.5}, r"annealing_ratio must be in \[0, 1\], got 1\.5"),
        (e3_temperature, {"annealing_factor": 0.0}, r"annealing_factor must be in \(0, 1\], got 0\.0"),
        (e3_temperature, {"low": 0.0}, r"low must be positive and finite, or None, got 0\.0"),
        (e3_temperature, {"low": 2.5}, r"low must be at most high = 2\.0, got 2\.5"),
        (e3_temperature, {"min_entropy": -1.0}, r"min_entropy must be finite and at least 0, got -1\.0"),
    ],
)
def test_refusals(factory, options, message):
    others = {
        entropy_temperature: {"high": 1.2, "low": 0.8, "threshold": 0.5},
        linear_entropy_temperature: {"slope": 0.1, "centre": 1.0, "low": 0.5, "high": 2.0},
        e3_temperature: {"vocab_size": 16},
    }
    with pytest.raises(ValueError, match=message):
        factory(**{**others.get(factory, {}), **options})

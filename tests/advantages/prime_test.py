"""PRIME against loops in NumPy and stored outputs, groups without outcome, rows without tokens."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import toy
from golden_cases import DOUBLE, TOLERANCE, close, make_test, relative

from jentropy.advantages.prime import largest_return, leave_one_out, prime

MASK = np.arange(5)[None, :] < np.array([5, 3, 0, 4, 2, 1, 3])[:, None]
GROUP = np.array([2, 0, 2, 0, 2, 1, 0])
REWARDS = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0], np.float32)
IMPLICIT = np.random.default_rng(0).normal(size=MASK.shape).astype(np.float32)


@functools.cache
def jitted(function):
    return jax.jit(lambda *args, **kwargs: function(*args, **kwargs), static_argnames="baseline")


def run(estimator, mask=MASK, rewards=REWARDS, implicit=IMPLICIT, group=GROUP, **row_data):
    token_data = {"implicit_reward": np.where(mask, implicit, np.nan)}
    rows = toy.rollouts(mask, rewards=rewards, group=group, token_data=token_data, row_data=row_data)
    return toy.estimate(estimator, rows)


def centred(reward, mask, group, baseline):
    """`leave_one_out` by its definition."""
    out = np.zeros(mask.shape)
    for i in range(len(mask)):
        others = [
            reward[j][mask[j]].mean() for j in range(len(mask)) if j != i and group[j] == group[i] and mask[j].any()
        ]
        if mask[i].any() and others:
            out[i] = np.where(mask[i], reward[i] - np.mean(others), 0.0)
            if baseline == "code":
                out[i] += np.where(mask[i], (reward[i] - reward[i][mask[i]].mean()) / len(others), 0.0)
    return out


def to_go(reward, mask, gamma):
    out = np.zeros(mask.shape)
    for row in range(len(mask)):
        later = 0.0
        for column in np.flatnonzero(mask[row])[::-1]:
            later = out[row, column] = reward[row, column] + gamma * later
    return out


def last_token(mask):
    last = np.zeros_like(mask)
    for row in range(len(mask)):
        last[row, np.flatnonzero(mask[row])[-1:]] = True
    return last


def unwhitened(mask, rewards, process, group, baseline, weights=(1.0, 1.0), gammas=(1.0, 1.0)):
    last = last_token(mask)
    by_process = to_go(centred(process, mask, group, baseline), mask, gammas[0])
    by_outcome = to_go(centred(np.where(last, rewards[:, None], 0.0), last, group, "paper"), mask, gammas[1])
    return weights[0] * by_process + weights[1] * by_outcome


def whiten(values, mask):
    x = values[mask]
    return np.where(mask, (values - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8), 0.0)


@pytest.mark.parametrize("baseline", ["paper", "code"])
def test_against_a_loop(baseline):
    weights, gammas = (0.5, 2.0), (0.9, 0.8)
    options: dict[str, Any] = {"process_weight": 0.5, "outcome_weight": 2.0, "process_gamma": 0.9, "outcome_gamma": 0.8}
    largest = np.abs(to_go(IMPLICIT, MASK, 1.0)).max()
    several = MASK & (GROUP != 1)[:, None]  # group 1 is a single row
    for whitened in (False, True):
        advantage, metrics = run(prime(baseline=baseline, whiten=whitened, **options))
        wanted = unwhitened(MASK, REWARDS, IMPLICIT / (largest + 1e-6), GROUP, baseline, weights, gammas)
        wanted = whiten(wanted, several) if whitened else wanted
        np.testing.assert_allclose(advantage, wanted, rtol=1e-5, atol=1e-6)
        assert not advantage[5].any() and not advantage[~MASK].any()
    np.testing.assert_allclose(metrics["prime/largest_implicit_return"], (largest, 1.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["prime/process_reward"], (IMPLICIT[MASK].sum() / largest, 18.0), rtol=1e-5)


def test_by_hand():
    """Two rows: the mean of the other row is all there is."""
    mask, implicit = np.array([[1, 1], [1, 0]], bool), np.array([[1.0, 3.0], [-2.0, 9.0]], np.float32)
    options = {"normalise": "none", "beta": 0.5, "whiten": False}
    rewards, group = np.array([1.0, 0.0], np.float32), np.zeros(2)
    # r: (0.5, 1.5), (-1); means 1 and -1; less the other's: (1.5, 2.5), (-2); to go: (4, 2.5), (-2); outcome 1 and -1
    advantage, _ = run(prime(**options), mask, rewards, implicit, group)
    np.testing.assert_allclose(advantage, [[5.0, 3.5], [-3.0, 0.0]], rtol=1e-6)
    # and with (r_t - 1) / 1 for the first row: (1, 3), (-2); to go: (4, 3), (-2)
    advantage, _ = run(prime(baseline="code", **options), mask, rewards, implicit, group)
    np.testing.assert_allclose(advantage, [[5.0, 4.0], [-3.0, 0.0]], rtol=1e-6)
    # Σ q on the last token: 2 and -1; less the other's: 3 and -3
    advantage, _ = run(prime(granularity="whole", **options), mask, rewards, implicit, group)
    np.testing.assert_allclose(advantage, [[4.0, 4.0], [-4.0, 0.0]], rtol=1e-6)


def test_the_scale_of_the_implicit_reward_does_not_matter():
    small, _ = run(prime())
    large, _ = run(prime(), implicit=64.0 * IMPLICIT)
    np.testing.assert_allclose(large, small, rtol=1e-4, atol=1e-5)


def test_outcomes_that_are_equal_say_nothing():
    silent = np.zeros_like(IMPLICIT)
    alone, _ = run(prime(whiten=False), rewards=np.full(7, 0.1, np.float32), implicit=silent)
    assert not alone.any()
    mixed, _ = run(prime(whiten=False), implicit=silent)
    assert not mixed[GROUP == 0].any() and mixed[GROUP == 2].any()
    process, _ = run(prime(whiten=False, outcome_weight=0.0))
    assert process[GROUP == 0][MASK[GROUP == 0]].all()


def test_rows_without_tokens_or_not_valid_are_not_of_their_group():
    valid = np.arange(7) != 4
    rewards = np.where(valid, REWARDS, np.nan).astype(np.float32)
    advantage, metrics = run(prime(whiten=False), rewards=rewards, is_valid=valid)
    used = MASK & valid[:, None]
    largest = np.abs(to_go(IMPLICIT, used, 1.0)).max()
    wanted = unwhitened(used, REWARDS, IMPLICIT / (largest + 1e-6), GROUP, "paper")
    np.testing.assert_allclose(advantage, wanted, rtol=1e-5, atol=1e-6)
    assert not advantage[GROUP == 2].any()  # row 0 is left alone
    assert metrics["prime/process_reward"][1] == used.sum()


def test_nothing_to_learn_from():
    advantage, metrics = run(prime(), mask=np.zeros_like(MASK))
    assert not advantage.any() and metrics["prime/largest_implicit_return"] == (0.0, 1.0)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_leave_one_out_of_an_outcome_is_one_thing(seed):
    """Rows with one token have one form; and a constant added to a whole group cancels in both."""
    rng = np.random.default_rng(seed)
    mask, group = rng.random((7, 5)) < 0.6, rng.integers(0, 3, 7).astype(np.int32)
    reward = (rng.integers(-8, 8, (7, 5)) / 8).astype(np.float32)
    function, last = jitted(leave_one_out), last_token(mask)
    one, two = (function(reward, last, group, baseline=b) for b in ("paper", "code"))
    np.testing.assert_allclose(one, two, atol=1e-6)
    for baseline in ("paper", "code"):
        found = function(reward, mask, group, baseline=baseline)
        np.testing.assert_allclose(found, centred(reward, mask, group, baseline), atol=1e-5)
        shift = np.float32(4.0) * (group == 1)[:, None]
        np.testing.assert_allclose(function(reward + shift, mask, group, baseline=baseline), found, atol=1e-5)


def test_missing_data():
    with pytest.raises(ValueError, match=r"prime needs token_data\['implicit_reward'\], got \[\]"):
        prime().estimate(toy.rollouts(MASK), prime().init())
    assert prime().requires == ("implicit_reward",) and prime().min_group_size == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "mean"}, "baseline must be paper or code, got 'mean'"),
        ({"normalise": "std"}, "normalise must be batch_norm or none, got 'std'"),
        ({"granularity": "step"}, "granularity must be token or whole, got 'step'"),
        ({"process_weight": -1.0}, r"process_weight must be finite and at least 0, got -1\.0"),
        ({"outcome_weight": float("nan")}, "outcome_weight must be finite and at least 0, got nan"),
        ({"process_gamma": 1.1}, r"process_gamma must be in \[0, 1\], got 1\.1"),
        ({"outcome_gamma": -0.1}, r"outcome_gamma must be in \[0, 1\], got -0\.1"),
        ({"beta": 0.0}, r"beta must be finite and above 0, got 0\.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        prime(**options)


SOURCES = {"rm": (1.0, 0.0), "gt": (0.0, 1.0), "both": (1.0, 1.0)}


def check_prime(golden, precision):
    """`base_prime_*`: rewards and advantages. A row without tokens makes its group, and all advantages, NaN there."""
    mask, tolerance, num = golden["response_mask"] > 0, TOLERANCE[precision], int(golden["n_samples"])
    group = np.arange(len(mask)) // num
    implicit = np.where(mask, golden["prm_logp"] - golden["ref_logp"], np.nan)
    raw = np.asarray(golden["reward_raw_token"], np.float64)
    relative(np.where(mask, implicit, 0.0), raw, TOLERANCE["f32"])
    largest = float(jitted(largest_return)(implicit, mask))
    relative(np.where(mask, implicit, 0.0) / (largest + 1e-6), golden["reward_bn_token"], TOLERANCE["f32"])
    whole = np.where(last_token(mask), np.where(mask, implicit, 0.0).sum(axis=1, keepdims=True), 0.0)
    relative(whole, golden["reward_raw_whole"], TOLERANCE["f32"])
    relative(whole / (np.abs(whole).max() + 1e-6), golden["reward_bn_whole"], TOLERANCE["f32"])
    full = np.repeat(mask.any(axis=1).reshape(-1, num).all(axis=1), num)
    used = mask & full[:, None]
    for key in (k for k in golden if k.startswith("ret_")):
        _, source, gamma = key.split("_")
        gamma = float(gamma.removeprefix("g")) / 100.0
        check_advantage(golden, source, gamma, used, group, tolerance)


def check_advantage(golden, source, gamma, used, group, tolerance):
    """One key: the rewards are the normalised ones, in float32, put in by way of β."""
    key, (process_weight, outcome_weight) = f"{source}_g{100 * gamma:.0f}", SOURCES[source]
    options = {"process_weight": process_weight, "outcome_weight": outcome_weight, "process_gamma": gamma}
    options |= {"outcome_gamma": gamma, "normalise": "none", "beta": 1.0, "baseline": "code"}
    mask = golden["response_mask"] > 0
    token_data = {"implicit_reward": np.asarray(golden["reward_bn_token"], np.float64)}
    rows = toy.rollouts(mask, rewards=np.asarray(golden["acc"], np.float64), group=group, token_data=token_data)
    returns, _ = toy.estimate(prime(whiten=False, **options), rows)
    relative(returns[used], golden[f"ret_{key}"][used], tolerance)
    assert np.isfinite(returns).all() and not returns[~mask].any()
    if used.sum() == mask.sum():
        whitened, _ = toy.estimate(prime(**options), rows)
        close(whitened[mask], golden[f"adv_{key}"][mask], tolerance)
        assert not whitened[~mask].any() and (mask.all() or golden[f"adv_{key}"][~mask].any())


FAMILIES = {"base_prime_*": (check_prime, DOUBLE)}

test_released_code = make_test(FAMILIES)

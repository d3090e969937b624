"""GAE against loops in NumPy and stored outputs, the divergence in the reward, its controller, values after the end."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from golden_cases import DOUBLE, TOLERANCE, close, make_test, relative, whitened_as_in_verl

from jentropy import stats
from jentropy.advantages.gae import adapted_kl_coef, gae, generalised_advantage

MASK = np.array([[0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]], bool)
REWARDS = np.array([1.0, 0.5, 7.0, -1.0], np.float32)
VALUE = np.random.default_rng(0).normal(size=MASK.shape).astype(np.float32)


@functools.cache
def jitted(function):
    return jax.jit(lambda *args: function(*args))


def loop(token_reward, value, mask, gamma, lam, bootstrap):
    advantage = np.zeros(mask.shape)
    for row in range(len(mask)):
        next_value, next_advantage = bootstrap[row], 0.0
        for column in np.flatnonzero(mask[row])[::-1]:
            delta = token_reward[row, column] + gamma * next_value - value[row, column]
            next_value, next_advantage = value[row, column], delta + gamma * lam * next_advantage
            advantage[row, column] = next_advantage
    return advantage


def run(estimator, mask=MASK, rewards=REWARDS, value=VALUE, row_data=None, state=None, **token_data):
    """`(advantage, returns, metrics, state)`."""
    token_data = {"value": np.where(mask, value, np.nan)} | token_data
    logp_old = token_data.pop("logp_old", None)
    rows = toy.rollouts(mask, rewards=rewards, logp_old=logp_old, token_data=token_data, row_data=row_data)
    state = estimator.init() if state is None else state
    advantage, added, metrics, state = jitted(estimator.estimate)(rows, state)
    return *jax.tree.map(np.asarray, (advantage, added["return"], metrics)), state


def on_last_token(rewards, mask):
    token_reward = np.zeros(mask.shape)
    for row, reward in enumerate(rewards):
        if mask[row].any():
            token_reward[row, np.flatnonzero(mask[row])[-1]] = reward
    return token_reward


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.5), (0.0, 1.0)])
def test_against_a_loop(gamma, lam):
    advantage, returns, metrics, _ = run(gae(gamma=gamma, lam=lam, whiten=False))
    wanted = loop(on_last_token(REWARDS, MASK), VALUE, MASK, gamma, lam, np.zeros(4))
    np.testing.assert_allclose(advantage, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(MASK, wanted + VALUE, 0.0), rtol=1e-5, atol=1e-6)
    explained = 1.0 - float(np.var(wanted[MASK]) / np.var((wanted + VALUE)[MASK]))
    if gamma:
        np.testing.assert_allclose(metrics["critic/vf_explained_var"], (explained, 1.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["critic/values/mean"], (VALUE[MASK].sum(), 8.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["critic/returns/mean"], ((wanted + VALUE)[MASK].sum(), 8.0), rtol=1e-5)


def test_by_hand_at_lambda_one():
    """The return is the reward of the response on all its tokens, and the advantage what the critic did not expect."""
    advantage, returns, _, _ = run(gae(whiten=False))
    np.testing.assert_allclose(returns, np.where(MASK, REWARDS[:, None], 0.0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(advantage, np.where(MASK, REWARDS[:, None] - VALUE, 0.0), rtol=1e-5, atol=1e-6)


def test_a_perfect_critic_leaves_nothing():
    advantage, _, metrics, _ = run(gae(lam=0.5), value=np.broadcast_to(REWARDS[:, None], MASK.shape))
    assert not advantage.any() and metrics["critic/vf_explained_var"] == (1.0, 1.0)


def test_equal_returns_have_no_explained_variance():
    for mask, rewards in ((MASK, np.ones(4, np.float32)), (np.zeros_like(MASK), REWARDS)):
        advantage, _, metrics, _ = run(gae(), mask, rewards)
        assert metrics["critic/vf_explained_var"][1] == 0.0 and np.isfinite(advantage).all()


def test_whitening_is_of_the_tokens_of_valid_rows():
    valid = np.array([True, True, True, False])
    used = MASK & valid[:, None]
    rewards = np.array([1.0, 0.5, 7.0, np.nan], np.float32)
    advantage, returns, _, _ = run(gae(lam=0.9), rewards=rewards, row_data={"is_valid": valid})
    raw = loop(on_last_token(REWARDS, used), VALUE, used, 1.0, 0.9, np.zeros(4))[used]
    wanted = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(advantage[used], wanted, rtol=1e-5, atol=1e-6)
    assert not advantage[~used].any() and not returns[~used].any()


def test_one_token_is_not_whitened():
    mask = np.zeros_like(MASK)
    mask[1, 3] = True
    advantage, returns, _, _ = run(gae(), mask)
    assert not advantage.any()
    np.testing.assert_allclose(returns[1, 3], 0.5, rtol=1e-6)


def test_value_after_the_last_token():
    end = np.array([0.0, 0.7, np.nan, -2.0], np.float32)
    valid = np.array([True, True, False, True])
    estimator = gae(gamma=0.9, lam=0.8, whiten=False, bootstrap=True)
    advantage, *_ = run(estimator, row_data={"bootstrap_value": end, "is_valid": valid})
    wanted = loop(on_last_token(REWARDS, MASK), VALUE, MASK, 0.9, 0.8, np.nan_to_num(end))
    np.testing.assert_allclose(advantage, wanted, rtol=1e-5, atol=1e-6)
    plain, *_ = run(gae(gamma=0.9, lam=0.8, whiten=False), row_data={"bootstrap_value": end, "is_valid": valid})
    assert np.any(np.abs(plain - advantage)[1] > 0.1)


def test_divergence_in_the_reward():
    rng = np.random.default_rng(1)
    old, ref = (np.where(MASK, -rng.exponential(size=MASK.shape), np.nan).astype(np.float32) for _ in range(2))
    divergence = np.where(MASK, old - ref, 0.0)
    estimator = gae(gamma=0.9, lam=0.8, whiten=False, kl_coef=0.3)
    advantage, _, metrics, state = run(estimator, logp_old=old, ref_log_prob=ref)
    wanted = loop(on_last_token(REWARDS, MASK) - 0.3 * divergence, VALUE, MASK, 0.9, 0.8, np.zeros(4))
    np.testing.assert_allclose(advantage, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["actor/reward_kl_penalty"], (divergence.sum(), 8.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["actor/reward_kl_penalty_coeff"], (0.3, 1.0), rtol=1e-6)
    assert state == estimator.init()


def test_controller_acts_on_the_next_rollout():
    old = np.where(MASK, -1.0, np.nan).astype(np.float32)
    ref = np.where(MASK, np.array([-1.25, -1.25, np.nan, -2.0])[:, None], np.nan).astype(np.float32)
    estimator = gae(kl_coef=0.5, kl_target=0.4, kl_horizon=10.0)
    _, _, metrics, state = run(estimator, logp_old=old, ref_log_prob=ref)
    # means of the three rows with tokens: 0.25, 0.25, 1; 0.5 / 0.4 - 1 = 0.25 is cut to 0.2
    np.testing.assert_allclose(metrics["actor/reward_kl_penalty_coeff"], (0.5, 1.0))
    np.testing.assert_allclose(state.kl_coef, 0.5 * (1.0 + 0.2 * 3.0 / 10.0), rtol=1e-6)
    _, _, metrics, later = run(estimator, logp_old=old, ref_log_prob=ref, state=state)
    np.testing.assert_allclose(metrics["actor/reward_kl_penalty_coeff"], (state.kl_coef, 1.0))
    assert later.kl_coef > state.kl_coef
    _, _, _, same = run(estimator, np.zeros_like(MASK), logp_old=old, ref_log_prob=ref, state=state)
    assert same.kl_coef == state.kl_coef


@pytest.mark.parametrize(("horizon", "failed"), [(0.5, 1.0), (0.7, 0.0)])
def test_a_horizon_that_would_turn_the_sign_stops_the_run(horizon, failed):
    old = np.where(MASK, -1.0, 0.0).astype(np.float32)
    estimator = gae(kl_coef=0.5, kl_target=0.4, kl_horizon=horizon)
    _, _, metrics, state = run(estimator, logp_old=old, ref_log_prob=old)
    assert metrics["error/kl_horizon is not above a fifth of the number of rows"] == (failed, 1.0)
    assert bool(state.kl_coef > 0.0) is not bool(failed)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_at_lambda_one_values_cancel_in_the_returns(seed):
    """Any values, any holes: the return is the reward-to-go; and at λ = 0 the advantage is one difference."""
    rng = np.random.default_rng(seed)
    mask, reward, value = rng.random((3, 5)) < 0.6, *rng.normal(size=(2, 3, 5)).astype(np.float32)
    zero, one, gamma = np.zeros(3, np.float32), jnp.float32(1.0), jnp.float32(rng.random())
    function = jitted(generalised_advantage)
    returns = np.where(mask, function(reward, value, mask, gamma, one, zero) + value, 0.0)
    np.testing.assert_allclose(returns, jitted(stats.reward_to_go)(reward, mask, gamma), rtol=1e-4, atol=1e-5)
    single = function(reward, value, mask, gamma, 0.0 * one, zero)
    wanted = loop(reward, value, mask, float(gamma), 0.0, zero)
    np.testing.assert_allclose(single, wanted, rtol=1e-4, atol=1e-5)


def test_missing_data_and_refusals():
    rows = toy.rollouts(MASK)
    with pytest.raises(ValueError, match=r"gae needs token_data\['value'\], got \[\]"):
        gae().estimate(rows, gae().init())
    rows = rows.replace(token_data={"value": jnp.asarray(VALUE)})
    with pytest.raises(ValueError, match=r"gae needs row_data\['bootstrap_value'\], got \[\]"):
        gae(bootstrap=True).estimate(rows, gae().init())
    with pytest.raises(ValueError, match=r"a kl_coef above 0 needs token_data\['ref_log_prob'\]"):
        gae(kl_coef=0.1).estimate(rows, gae().init())
    assert gae().requires == ("value",)
    assert gae(kl_coef=0.1, bootstrap=True).requires == ("value", "ref_log_prob", "bootstrap_value")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1\.1"),
        ({"lam": -0.1}, r"lam must be in \[0, 1\], got -0\.1"),
        ({"kl_coef": -1.0}, r"kl_coef must be finite and at least 0, got -1\.0"),
        ({"kl_coef": 0.1, "kl_target": 0.0}, r"kl_target must be finite and above 0, got 0\.0"),
        ({"kl_target": 0.1}, r"kl_target must be None if kl_coef is 0, got 0\.1"),
        ({"kl_horizon": 0.0}, r"kl_horizon must be finite and above 0, got 0\.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        gae(**options)


def check_gae(golden, precision):
    """`base_gae_*`: verl, rewards per token. It does not set the whitened advantages of padding to 0: we do."""
    mask, tolerance = golden["response_mask"] > 0, TOLERANCE[precision]
    reward, value = golden["token_level_rewards"], golden["values"]
    gamma, lam = (jnp.asarray(float(golden[k])) for k in ("gamma", "lam"))
    garbage = np.where(mask, reward, np.nan), np.where(mask, value, np.nan)
    raw = np.asarray(jitted(generalised_advantage)(*garbage, mask, gamma, lam, np.zeros(len(mask))))
    relative((raw + value)[mask], golden["returns"][mask], tolerance)
    scale = max(np.abs(golden["returns"][mask]).max(initial=0.0), np.abs(value[mask]).max(initial=0.0), 1.0)
    close(raw[mask] / scale, golden["advantages_raw"][mask] / scale, tolerance)
    assert not raw[~mask].any()
    whitened = np.asarray(jitted(stats.whiten)(raw, mask))
    close(whitened_as_in_verl(whitened, raw, mask)[mask], golden["advantages"][mask], tolerance)
    assert not whitened[~mask].any()
    if not mask.all() and golden["advantages"][mask].any():
        assert golden["advantages"][~mask].all()


def check_whitening(golden, precision):
    """`base_whiten`: verl's `masked_whiten`."""
    mask, values = golden["mask"] > 0, golden["values"]
    whitened = np.asarray(jitted(stats.whiten)(np.where(mask, values, np.nan), mask))
    close(whitened_as_in_verl(whitened, values, mask)[mask], golden["whitened"][mask], TOLERANCE[precision])


def check_controller(golden, precision):
    """`base_klctrl`: verl's `AdaptiveKLController`."""
    numbers = (jnp.asarray(float(golden[k])) for k in ("n_steps", "target", "horizon"))
    num_rows, target, horizon = numbers
    value = jnp.asarray(float(golden["init"]))
    for divergence, after in zip(golden["current_kl"], golden["value_after"]):
        value = jitted(adapted_kl_coef)(value, jnp.asarray(divergence), num_rows, target, horizon)
        close(value, after, TOLERANCE[precision])


FAMILIES = {
    "base_gae_*": (check_gae, DOUBLE),
    "base_whiten*": (check_whitening, DOUBLE),
    "base_klctrl*": (check_controller, DOUBLE),
}

test_released_code = make_test(FAMILIES)

"""ETPO: stored numbers of the released code, its documented defects, and the optimum of a small enumerated task."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from golden_cases import BOTH, TOLERANCE, close, make_test

from jentropy import normalisers
from jentropy.etpo import etpo, huber, state_loss
from jentropy.soft_value import Heads, LinearHead, action_values, soft_bellman_targets, soft_values

METHOD = etpo(beta=0.3, gamma=0.9, huber_delta=1.0, polyak=0.75)


def token_weight(mask):
    return normalisers.token_mean(jnp.asarray(mask), toy.rollouts(mask))


def random_heads(mask, vocab_size=7, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [((*mask.shape, d), (vocab_size, d)) for d in (4, 3, 5)]
    return Heads(*(LinearHead(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in pair)) for pair in shapes))


def toy_update(seed=0):
    """`(heads, tokens, reward, mask, weight)` of four ragged rows, one of them empty."""
    rng = np.random.default_rng(seed)
    mask = jnp.asarray(np.arange(6)[None, :] < np.array([[6], [1], [0], [4]]))
    tokens, reward = jnp.asarray(rng.integers(0, 7, mask.shape), jnp.int32), jnp.asarray(rng.normal(size=mask.shape))
    return random_heads(mask, seed=seed), tokens, reward, mask, token_weight(mask)


def test_losses_are_sums_of_their_parts():
    heads, tokens, reward, mask, weight = toy_update()
    state, num_tokens = METHOD.init(), 11
    targets, q_loss, policy_loss = (jax.jit(f) for f in METHOD[1:4])
    values = np.asarray(soft_values(heads, mask, 0.3))
    target = targets(state, heads, reward, mask)
    np.testing.assert_allclose(target, soft_bellman_targets(jnp.asarray(values), reward, mask, 0.9), rtol=1e-6)
    error = np.asarray(target - action_values(heads.critic, tokens, mask))[np.asarray(mask)]
    expected = np.where(np.abs(error) <= 1.0, error**2 / 2.0, np.abs(error) - 0.5)
    assert 0 < np.sum(np.abs(error) > 1.0) < num_tokens
    loss, metrics = q_loss(state, heads.critic, tokens, target, mask, weight)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["critic/vf_loss"], (expected.sum(), num_tokens), rtol=1e-5)
    np.testing.assert_array_equal(metrics["critic/huber_clipfrac"], (np.sum(np.abs(error) > 1.0), num_tokens))
    predicted = np.asarray(target)[np.asarray(mask)].sum() - error.sum()
    np.testing.assert_allclose(metrics["critic/vpred_mean"], (predicted, num_tokens), rtol=1e-4)
    loss, metrics = policy_loss(state, heads, mask, weight)
    np.testing.assert_allclose(loss, -values.sum() / num_tokens, rtol=1e-5)
    np.testing.assert_allclose(metrics["actor/soft_value"], (values.sum(), num_tokens), rtol=1e-5)


def test_each_loss_teaches_its_own_model():
    heads, tokens, reward, mask, weight = toy_update()
    state = METHOD.init()

    @jax.jit
    def gradients(heads):
        def q(heads):
            return METHOD.q_loss(state, heads.critic, tokens, METHOD.targets(state, heads, reward, mask), mask, weight)

        def policy(heads):
            return METHOD.policy_loss(state, heads, mask, weight)

        return [jax.grad(lambda h, loss=loss: loss(h)[0])(heads) for loss in (q, policy)]

    for gradient, learns in zip(gradients(heads), ("critic", "policy")):
        for name, head in gradient._asdict().items():
            assert all(np.any(x) == (name == learns) for x in head)


def test_micro_batches_add_up():
    heads, tokens, reward, mask, weight = toy_update()
    state = METHOD.init()

    @jax.jit
    def losses(rows):
        part = Heads(*(head._replace(hidden=head.hidden[rows]) for head in heads))
        target = METHOD.targets(state, part, reward[rows], mask[rows])
        q, _ = METHOD.q_loss(state, part.critic, tokens[rows], target, mask[rows], weight[rows])
        return jnp.stack([q, METHOD.policy_loss(state, part, mask[rows], weight[rows])[0]])

    whole = losses(np.arange(4))
    np.testing.assert_allclose(losses(np.array([3, 0])) + losses(np.array([2, 1])), whole, rtol=1e-5)


def test_nothing_to_learn_from():
    heads, tokens, reward, mask, _ = toy_update()
    none = jnp.zeros_like(mask)
    state, weight = METHOD.init(), token_weight(none)
    target = jax.jit(METHOD.targets)(state, heads, reward, none)
    loss, metrics = jax.jit(METHOD.q_loss)(state, heads.critic, tokens, target, none, weight)
    assert loss == 0.0 and metrics["critic/vf_loss"] == (0.0, 0.0) and not np.any(target)
    assert jax.jit(METHOD.policy_loss)(state, heads, none, weight)[0] == 0.0


def test_huber():
    error = jnp.array([-5.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0])
    expected = [8.0, 2.0, 0.5, 0.0, 0.5, 2.0, 8.0]
    np.testing.assert_array_equal(huber(error, 2.0), expected)
    np.testing.assert_array_equal(huber(error, 2.0, compat="released"), [0.0, *expected[1:]])
    slope = jax.grad(lambda e: huber(e, 2.0).sum())(error)
    np.testing.assert_array_equal(slope, [-2.0, -2.0, -1.0, 0.0, 1.0, 2.0, 2.0])
    np.testing.assert_array_equal(huber(error, float("inf")), np.square(error) / 2.0)


def test_the_released_policy_loss_does_not_know_the_reward():
    """Its gradient is β (1/n - π), whatever Q is; ours is not, and vanishes at ρ exp(Q / β)."""
    rng = np.random.default_rng(0)
    pi_logits, rho_logits, q, other = (jnp.asarray(rng.normal(size=(3, 5)), jnp.float32) for _ in range(4))

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(logits, q, compat):
        return jax.grad(lambda z: state_loss(z, rho_logits, q, 0.3, compat=compat).sum())(logits)

    released = gradient(pi_logits, q, "released")
    np.testing.assert_allclose(released, 0.3 * (0.2 - jax.nn.softmax(pi_logits)), atol=1e-7)
    np.testing.assert_array_equal(released, gradient(pi_logits, other, "released"))
    consistent = (gradient(pi_logits, x, "consistent") for x in (q, other))
    assert np.abs(np.subtract(*consistent)).max() > 0.1
    optimum = jax.nn.log_softmax(rho_logits) + q / 0.3
    np.testing.assert_allclose(gradient(optimum, q, "consistent"), 0.0, atol=1e-6)
    assert np.abs(gradient(optimum, q, "released")).max() > 0.03


def test_track():
    state = METHOD.init()
    target, params = {"a": jnp.array([1.0, 2.0]), "b": jnp.zeros(())}, {"a": jnp.array([5.0, 2.0]), "b": jnp.ones(())}
    moved = METHOD.track(state, target, params)
    np.testing.assert_allclose(moved["a"], [2.0, 2.0])
    np.testing.assert_allclose(moved["b"], 0.25)
    jax.tree.map(np.testing.assert_array_equal, etpo(polyak=0.0).track(etpo(polyak=0.0).init(), target, params), params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), target)
    assert METHOD.track(state, half, params)["a"].dtype == jnp.bfloat16


def test_settings_share_their_functions():
    for ours, theirs in zip(etpo(beta=0.1)[1:], etpo(gamma=1.0, huber_delta=1.0)[1:]):
        assert ours == theirs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta must be finite and above 0, got 0.0"),
        ({"beta": float("inf")}, "beta must be finite and above 0, got inf"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"huber_delta": 0.0}, "huber_delta must be above 0, got 0.0"),
        ({"huber_delta": float("nan")}, "huber_delta must be above 0, got nan"),
        ({"polyak": -0.1}, r"polyak must be in \[0, 1\], got -0.1"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        etpo(**settings)


def test_unknown_forms():
    zeros = jnp.zeros((1, 3))
    with pytest.raises(ValueError, match=r"compat must be one of .*, got 'code'"):
        state_loss(zeros, zeros, zeros, 0.1, compat="code")
    with pytest.raises(ValueError, match=r"compat must be one of .*, got ''"):
        huber(zeros, 1.0, compat="")


# A task small enough to enumerate: two actions of two tokens, three ids.

NUM_IDS, ACTION, LENGTH, TASK_BETA, TASK_GAMMA = 3, 2, 4, 0.5, 0.9
SEQUENCES = list(itertools.product(range(NUM_IDS), repeat=LENGTH))
PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(NUM_IDS), repeat=n)]


def task_reward(prefix):
    """Of an action that has just ended: any function of the text so far."""
    return np.sin(3.0 * sum((i + 1) * (k + 1) for k, i in enumerate(prefix))) if len(prefix) % ACTION == 0 else 0.0


def soft_value_iteration(rho):
    """`(Q*, π*)`, each `[prefix, id]`, backwards from the end: V*(s) = β log Σ_v ρ_v exp(Q*_v / β)."""
    q, best, value = np.zeros_like(rho), np.zeros_like(rho), {s: 0.0 for s in SEQUENCES}
    for k in reversed(range(len(PREFIXES))):
        for i in range(NUM_IDS):
            text = (*PREFIXES[k], i)
            ends = len(text) % ACTION == 0
            q[k, i] = task_reward(text) + (TASK_GAMMA if ends else 1.0) * value[text]
        weight = rho[k] * np.exp(q[k] / TASK_BETA)
        value[PREFIXES[k]], best[k] = TASK_BETA * np.log(weight.sum()), weight / weight.sum()
    return q, best


@functools.cache
def learned_tables():
    """Tables of Q and π after learning from all texts with the method's own targets, losses and target network."""
    number = {prefix: k for k, prefix in enumerate(PREFIXES)}
    state_of = jnp.asarray([[number[s[:t]] for t in range(LENGTH)] for s in SEQUENCES])
    tokens, mask = jnp.asarray(SEQUENCES, jnp.int32), jnp.ones((len(SEQUENCES), LENGTH), bool)
    rewards = jnp.asarray([[task_reward(s[: t + 1]) for t in range(LENGTH)] for s in SEQUENCES])
    ends = jnp.asarray(np.broadcast_to(np.arange(1, LENGTH + 1) % ACTION == 0, mask.shape))
    rho = np.random.default_rng(0).dirichlet(np.full(NUM_IDS, 3.0), len(PREFIXES))
    num_visits = np.array([NUM_IDS ** (LENGTH - len(p)) for p in PREFIXES])
    weight = jnp.asarray(1.0 / num_visits)[state_of]  # every prefix counts once
    method = etpo(beta=TASK_BETA, gamma=TASK_GAMMA, polyak=0.5)
    state, reference = method.init(), LinearHead(jax.nn.one_hot(state_of, len(PREFIXES)), jnp.log(rho).T)

    def head(table):
        return LinearHead(reference.hidden, table.T)

    def update(tables, _):
        pi, q, slow = tables
        target = method.targets(state, Heads(head(pi), reference, head(slow)), rewards, mask, action_end=ends)
        q_slope = jax.grad(lambda x: method.q_loss(state, head(x), tokens, target, mask, weight)[0])(q)
        pi_slope = jax.grad(lambda x: method.policy_loss(state, Heads(head(x), reference, head(q)), mask, weight)[0])
        q, pi = q - 0.8 * NUM_IDS * q_slope, pi - 4.0 * pi_slope(pi)
        return (pi, q, method.track(state, slow, q)), None

    start = (jnp.log(rho), jnp.zeros(rho.shape), jnp.zeros(rho.shape))
    (pi, q, _), _ = jax.jit(lambda tables: jax.lax.scan(update, tables, None, length=1500))(start)
    return rho, np.asarray(q), np.asarray(jax.nn.softmax(pi))


def test_soft_value_iteration_on_an_enumerated_task():
    with jax.enable_x64():
        rho, q, pi = learned_tables()
    best_q, best_pi = soft_value_iteration(rho)
    np.testing.assert_allclose(q, best_q, atol=1e-6)
    np.testing.assert_allclose(pi, best_pi, atol=1e-6)
    assert np.abs(best_pi - rho).max() > 0.3


# Stored numbers.


def actions_of(golden, key, dtype):
    """`[step, thread, T, ...]` of the released buffer as one row per action; the state after the last step is cut."""
    array = golden[key]
    num_steps, num_threads = golden["rewards"].shape
    array = array.reshape(array.shape[0], num_threads, *array.shape[-2:])[:num_steps]
    return jnp.asarray(array.reshape(num_steps * num_threads, *array.shape[-2:]), dtype)


def expectations(golden, dtype):
    """E_π[Q] and D_KL(π ‖ ρ) of all states, `[step + 1, thread, T]`, by the method's own function."""
    logits = [jnp.asarray(golden[k][:, :, 0], dtype) for k in ("pi_logits", "rho_logits", "q")]
    zero = jnp.zeros_like(logits[0])
    loss = jax.jit(state_loss)
    return -np.asarray(loss(logits[0], logits[0], logits[2], 1.0)), np.asarray(loss(logits[0], logits[1], zero, 1.0))


def check_targets(golden, dtype, tolerance):
    """The corrected returns are ours; the released ones take later divergences from the next step."""
    expected_q, divergence = expectations(golden, dtype)
    beta, (num_steps, num_threads) = float(golden["beta"]), golden["rewards"].shape
    length = golden["lengths"].reshape(-1, 1)
    num_columns = expected_q.shape[-1]
    mask, column = np.arange(num_columns)[None, :] < length, np.arange(num_columns)[None, :]
    after = (expected_q - beta * divergence)[1:, :, 0] * golden["not_done"][1:]
    reward = np.where(column == length - 1, golden["rewards"].reshape(-1, 1), np.nan)
    for key, later in (("returns_corrected", divergence[:-1]), ("returns_ref", divergence[1:])):
        value = (expected_q[:-1] - beta * later).reshape(num_steps * num_threads, num_columns)
        ours = soft_bellman_targets(
            jnp.asarray(value, dtype),
            jnp.asarray(reward, dtype),
            jnp.asarray(mask),
            float(golden["gamma"]),
            bootstrap=jnp.asarray(after.reshape(-1), dtype),
        )
        theirs = golden[key].reshape(mask.shape)
        known = mask & np.isfinite(theirs)
        assert known.any() and np.isfinite(ours).all()
        scale = max(1.0, np.abs(theirs[known]).max())
        close(ours[known] / scale, theirs[known] / scale, tolerance)


def check_loss(loss, golden, keys, argument, tolerance):
    """A scalar and its gradient `[rows, 1, T, V]`, relative to the largest entry where that is above 1."""
    value, gradient = jax.jit(jax.value_and_grad(loss))(argument)
    for ours, key in zip((value, gradient), keys):
        if key in golden:
            scale = max(1.0, np.abs(golden[key]).max())
            close(np.reshape(ours, golden[key].shape) / scale, golden[key] / scale, tolerance)


def check_etpo(golden, precision):
    """`base_etpo_*`: targets, policy losses and the loss of Q of one buffer, as released and as corrected."""
    dtype, tolerance = np.float64 if precision == "f64" else np.float32, TOLERANCE[precision]
    check_targets(golden, dtype, tolerance)
    pi, rho, q = (actions_of(golden, key, dtype) for key in ("pi_logits", "rho_logits", "q"))
    mask = jnp.asarray(golden["token_mask"].reshape(pi.shape[:2]) > 0)
    weight, beta = token_weight(mask).astype(dtype), float(golden["beta"])
    forms = {
        "ref_uniform": lambda z: state_loss(z, rho, q, beta, compat="released"),
        "exact_klref": lambda z: state_loss(z, rho, q, beta),
        "exact_noref": lambda z: state_loss(z, jnp.zeros_like(rho), q, beta) - beta * np.log(rho.shape[-1]),
    }
    for name, form in forms.items():
        keys = (f"policy_loss_{name}", f"policy_grad_{name}")
        check_loss(lambda z, f=form: jnp.sum(weight * f(z)), golden, keys, pi, tolerance)
    method = etpo(beta=beta, huber_delta=float(golden["huber_delta"]))
    identity = jnp.broadcast_to(jnp.eye(pi.shape[-1], dtype=dtype), (pi.shape[-1],) * 2)
    heads = Heads(LinearHead(pi, identity), LinearHead(rho, identity), LinearHead(q, identity))

    def whole_policy_loss(z):
        return method.policy_loss(method.init(), heads._replace(policy=LinearHead(z, identity)), mask, weight)[0]

    check_loss(whole_policy_loss, golden, ("policy_loss_exact_klref", "policy_grad_exact_klref"), pi, tolerance)
    tokens = jnp.asarray(golden["action_tokens"].reshape(mask.shape), jnp.int32)
    target = jnp.asarray(np.nan_to_num(golden["returns_ref"]).reshape(mask.shape), dtype)

    def released_q_loss(z):
        error = target - action_values(LinearHead(z, identity), tokens, mask)
        return jnp.sum(weight * huber(error, method.init().huber_delta, compat="released"))

    check_loss(released_q_loss, golden, ("value_loss_ref", "value_grad_ref"), q, tolerance)
    error = np.asarray(target) - np.take_along_axis(np.asarray(q), np.asarray(tokens)[..., None], 2)[..., 0]
    if not np.any(error[np.asarray(mask)] < -float(golden["huber_delta"])):

        def q_loss(z):
            return method.q_loss(method.init(), LinearHead(z, identity), tokens, target, mask, weight)[0]

        check_loss(q_loss, golden, ("value_loss_ref", "value_grad_ref"), q, tolerance)


FAMILIES = {"base_etpo_*": (check_etpo, BOTH)}
test_released_code = make_test(FAMILIES)

"""The soft value of a state and the targets of Q: NumPy loops, the optimum, chunks, memory, holes in a response."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jentropy.features import LOG_ZERO
from jentropy.soft_value import (
    Heads,
    LinearHead,
    action_values,
    last_token,
    soft_bellman_targets,
    soft_value,
    soft_values,
)

BETA = 0.3


def log_softmax(z):
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference_value(pi_logits, rho_logits, q, beta=BETA):
    log_pi, log_rho = log_softmax(pi_logits), log_softmax(rho_logits)
    return (np.exp(log_pi) * (q - beta * (log_pi - log_rho))).sum(-1)


def random_logits(seed=0, shape=(4, 6), dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) * 2 for _ in range(3)]


@jax.jit
def value_and_gradients(pi_logits, rho_logits, q):
    def total(*args):
        value = soft_value(*args, BETA)
        return value.sum(), value

    (_, value), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(pi_logits, rho_logits, q)
    return value, gradients


def test_value_and_gradient():
    logits = random_logits()
    value, (to_pi, to_rho, to_q) = value_and_gradients(*map(jnp.asarray, logits))
    np.testing.assert_allclose(value, reference_value(*logits), rtol=1e-5, atol=1e-6)
    log_pi, log_rho = log_softmax(logits[0]), log_softmax(logits[1])
    gain, pi = logits[2] - BETA * (log_pi - log_rho), np.exp(log_pi)
    np.testing.assert_allclose(to_pi, pi * (gain - (pi * gain).sum(-1, keepdims=True)), rtol=1e-4, atol=1e-6)
    assert not np.any(to_rho) and not np.any(to_q)


def test_the_optimum_is_the_reference_times_exp_of_q():
    _, rho_logits, q = random_logits()
    best = log_softmax(rho_logits) + q / np.float32(BETA)
    value, (gradient, _, _) = value_and_gradients(best, rho_logits, q)
    np.testing.assert_allclose(value, BETA * np.log(np.exp(best).sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
    for other in random_logits(1):
        assert np.all(value_and_gradients(other, rho_logits, q)[0] < value)


def test_the_policy_is_the_reference():
    pi_logits, _, q = random_logits()
    value, _ = value_and_gradients(pi_logits, pi_logits + np.float32(3.0), q)
    np.testing.assert_allclose(value, (np.exp(log_softmax(pi_logits)) * q).sum(-1), rtol=1e-5, atol=1e-6)


def test_temperature_is_of_both_policies_and_not_of_q():
    pi_logits, rho_logits, q = random_logits()
    expected = reference_value(pi_logits / 0.5, rho_logits / 0.5, q)
    np.testing.assert_allclose(soft_value(pi_logits, rho_logits, q, BETA, temperature=0.5), expected, rtol=1e-5)
    tau = jnp.array([0.5, 1.0, 2.0, 0.5])
    rows = soft_value(pi_logits, rho_logits, q, BETA, temperature=tau)
    expected = reference_value(*(x / np.asarray(tau)[:, None] for x in (pi_logits, rho_logits)), q)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


def test_illegal_ids():
    """Ids ruled out by a mask, or by -inf, are as if they were not there, whatever Q holds for them."""
    logits = random_logits()
    expected = reference_value(*(x[:, :4] for x in logits))
    poisoned = [x.copy() for x in logits]
    poisoned[2][:, 4:] = np.nan
    mask = jnp.arange(6) < 4
    np.testing.assert_allclose(soft_value(*poisoned, BETA, vocab_mask=mask), expected, rtol=1e-5, atol=1e-6)
    poisoned[0][:, 4:] = poisoned[1][:, 4:] = -np.inf
    value, (gradient, _, _) = value_and_gradients(*poisoned)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, 4:])


def test_impossible_for_the_reference_is_huge_and_finite():
    pi_logits, rho_logits, q = random_logits()
    rho_logits[:, 0] = -np.inf
    value, (gradient, _, _) = value_and_gradients(pi_logits, rho_logits, q)
    np.testing.assert_allclose(value, np.exp(log_softmax(pi_logits))[:, 0] * BETA * LOG_ZERO, rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_a_state_without_a_legal_id():
    logits = [np.full((1, 3), -np.inf, np.float32), *(x[:1, :3] for x in random_logits()[1:])]
    value, (gradient, _, _) = value_and_gradients(*logits)
    assert value[0] == 0.0 and not np.any(gradient)


def random_heads(seed=0, shape=(3, 7), vocab_size=11, widths=(4, 5, 3)):
    rng = np.random.default_rng(seed)
    heads = (
        LinearHead(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((*shape, d), (vocab_size, d))))
        for d in widths
    )
    mask = np.arange(shape[1])[None, :] < np.array([[shape[1]], [3], [0]])
    mask[0, 2] = False
    return Heads(*heads), jnp.asarray(mask)


def plain_values(heads, mask):
    logits = [np.einsum("btd,vd->btv", *map(np.asarray, head)) for head in heads]
    return np.where(mask, reference_value(*logits), 0.0)


def plain_gradient(heads, mask):
    def total(policy):
        logits = [jnp.einsum("btd,vd->btv", *head) for head in (policy, *heads[1:])]
        return jnp.sum(jnp.where(mask, soft_value(*logits, BETA), 0.0))

    return jax.jit(jax.grad(total))(heads.policy)


@pytest.mark.parametrize("chunk_columns", [1, 3, 7, None])
def test_chunks_change_nothing(chunk_columns):
    heads, mask = random_heads()

    def total(heads):
        values = soft_values(heads, mask, BETA, chunk_columns=chunk_columns)
        return values.sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(heads)
    np.testing.assert_allclose(values, plain_values(heads, mask), rtol=2e-5, atol=2e-6)
    for ours, theirs in zip(gradient.policy, plain_gradient(heads, mask)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)
    assert not any(np.any(x) for head in gradient[1:] for x in head)


def test_what_stands_outside_the_mask_has_no_influence():
    heads, mask = random_heads()
    poisoned = Heads(*(h._replace(hidden=jnp.where(mask[..., None], h.hidden, jnp.nan)) for h in heads))
    tau = jnp.where(mask, 0.7, jnp.nan)

    @jax.jit
    def run(heads, tau):
        def total(heads):
            tokens = jnp.where(mask, 2, -5)
            value = soft_values(heads, mask, BETA, temperature=tau, chunk_columns=2)
            return jnp.sum(value + action_values(heads.critic, tokens, mask))

        return jax.value_and_grad(total)(heads)

    clean = run(heads, jnp.full(mask.shape, 0.7))
    for ours, theirs in zip(jax.tree.leaves(run(poisoned, tau)), jax.tree.leaves(clean)):
        np.testing.assert_array_equal(ours, theirs)


def sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_no_array_over_all_tokens_and_the_vocabulary():
    heads, mask = random_heads(shape=(3, 8), vocab_size=50)

    def gradient(chunk_columns):
        return jax.grad(lambda heads: soft_values(heads, mask, BETA, chunk_columns=chunk_columns).sum())

    assert max(sizes(jax.make_jaxpr(gradient(8))(heads).jaxpr)) == 3 * 8 * 50
    assert max(sizes(jax.make_jaxpr(gradient(2))(heads).jaxpr)) == 3 * 2 * 50


def test_values_of_actions():
    heads, mask = random_heads()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 11, mask.shape), jnp.int32)

    def plain(critic):
        q = jnp.einsum("btd,vd->btv", *critic)
        return jnp.where(mask, jnp.take_along_axis(q, tokens[..., None], axis=2)[..., 0], 0.0)

    np.testing.assert_allclose(action_values(heads.critic, tokens, mask), plain(heads.critic), rtol=1e-5, atol=1e-6)
    ours, theirs = (
        jax.grad(lambda c, f=f: jnp.sum(jnp.square(f(c))))(heads.critic)
        for f in (lambda c: action_values(c, tokens, mask), plain)
    )
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bad_chunks():
    heads, mask = random_heads()
    with pytest.raises(ValueError, match="chunk_columns must be at least 1, got 0"):
        soft_values(heads, mask, BETA, chunk_columns=0)


# Targets.

T, F = True, False


def test_targets_by_hand():
    """A response with a hole, one of a single token, one that is empty, and one with two actions around a hole."""
    mask = np.array([[F, T, F, T, T], [F, F, F, F, T], [F, F, F, F, F], [T, T, F, T, T]])
    value = np.where(mask, np.arange(20.0).reshape(4, 5), np.nan)
    reward = np.full((4, 5), np.nan)
    reward[:2, 4], reward[3, [1, 4]] = [1.0, 2.0], [10.0, 20.0]
    ends = np.zeros((4, 5), bool)
    ends[3, 1] = True
    targets = soft_bellman_targets(*map(jnp.asarray, (value, reward, mask)), 0.5, action_end=jnp.asarray(ends))
    expected = [[0, 3, 0, 4, 1], [0, 0, 0, 0, 2], [0, 0, 0, 0, 0], [16, 10 + 0.5 * 18, 0, 19, 20]]
    np.testing.assert_allclose(targets, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_bootstrap_and_the_only_action(gamma):
    mask = jnp.array([[T, T, F], [T, T, T]])
    value, reward = jnp.arange(6.0).reshape(2, 3), jnp.full((2, 3), 7.0)
    targets = soft_bellman_targets(value, reward, mask, gamma, bootstrap=jnp.array([4.0, 0.0]))
    np.testing.assert_allclose(targets, [[1.0, 7.0 + gamma * 4.0, 0.0], [4.0, 5.0, 7.0]], rtol=1e-6)


def test_against_a_loop():
    rng = np.random.default_rng(0)
    mask, ends = rng.random((6, 12)) < 0.7, rng.random((6, 12)) < 0.2
    value, reward, after = (rng.normal(size=s).astype(np.float32) for s in ((6, 12), (6, 12), 6))
    expected = np.zeros((6, 12))
    for b in range(6):
        columns = np.flatnonzero(mask[b])
        for now, following in zip(columns, [*columns[1:], None]):
            later = after[b] if following is None else value[b, following]
            is_end = ends[b, now] or following is None
            expected[b, now] = reward[b, now] + 0.9 * later if is_end else later
    args = map(jnp.asarray, (value, reward, mask))
    targets = soft_bellman_targets(*args, 0.9, action_end=jnp.asarray(ends), bootstrap=jnp.asarray(after))
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


def test_last_token():
    mask = jnp.array([[F, T, F, T, F], [F, F, F, F, F], [T, T, T, T, T]])
    np.testing.assert_array_equal(last_token(mask), [[F, F, F, T, F], [F] * 5, [F, F, F, F, T]])

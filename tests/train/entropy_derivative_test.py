"""The derivative of the entropy along a direction, against finite differences and plain logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import rollouts

from jentropy import features
from jentropy.base import ENTROPY, Policy
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.train.entropy_derivative import entropy_derivative
from jentropy.train.scoring import make_scorer

V, D = 11, 6


def small_policy(dtype) -> Policy:
    """A causal policy of one hidden layer over the running mean of embeddings, in any dtype."""

    def init(key):
        keys = jax.random.split(key, 3)
        shapes = {"embed": (V, D), "inner": (D, D), "unembed": (V, D)}
        return {name: jax.random.normal(k, s, dtype) for k, (name, s) in zip(keys, shapes.items(), strict=True)}

    def hidden(params, tokens):
        read = jnp.cumsum(params["embed"][tokens], axis=1)
        return jnp.tanh(read / jnp.arange(1, tokens.shape[1] + 1, dtype=dtype)[None, :, None] @ params["inner"])

    def not_there(*args):
        raise AssertionError("not used")

    return Policy(init, hidden, lambda params: params["unembed"], not_there, not_there, not_there, V)


def rows(dtype: type = np.float32, temperature=None):
    rng = np.random.default_rng(3)
    mask = rng.random((4, 7)) < 0.7
    mask[:, 0], mask[0, 1] = False, True
    data = {} if temperature is None else {"temperature": rng.uniform(0.5, 1.5, mask.shape).astype(dtype)}
    return rollouts(mask, token_data=data).replace(tokens=jnp.asarray(rng.integers(0, V, mask.shape), jnp.int32))


def direction(params, size, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(size * rng.standard_normal(x.shape), x.dtype), params)


def moved(params, tangent, step):
    return jax.tree.map(lambda p, d: p + jnp.asarray(step, p.dtype) * d, params, tangent)


@pytest.mark.parametrize("own_temperature", [None, True])
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_it_is_a_finite_difference_of_the_entropy(own_temperature, size):
    with jax.enable_x64(True):
        policy, batch = small_policy(jnp.float64), rows(np.float64, own_temperature)
        params = policy.init(jax.random.key(0))
        tangent, scorer = direction(params, size), make_scorer(policy, (ENTROPY,), 0.8)
        step = 1e-5 / size
        after, before = (scorer(moved(params, tangent, s), {}, batch)["entropy"] for s in (step, -step))
        found = entropy_derivative(policy, params, tangent, batch, 0.8)
        expected = (after - before) / (2 * step)
        assert found.shape == (4, 7) and float(jnp.abs(expected).max()) > 0.1 * size
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8 * size)
        assert not np.any(np.asarray(found)[~np.asarray(batch.loss_mask)])


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-12, 1e-25])
def test_a_small_step_keeps_its_digits_in_float32(size):
    policy, batch = small_policy(jnp.float32), rows()
    params = policy.init(jax.random.key(0))
    unit = entropy_derivative(policy, params, direction(params, 1.0), batch, 1.0)
    found = entropy_derivative(policy, params, direction(params, size), batch, 1.0)
    np.testing.assert_allclose(np.asarray(found) / size, unit, rtol=1e-4, atol=1e-5)


def test_it_is_linear_in_the_direction_and_0_along_none():
    policy, batch = small_policy(jnp.float32), rows()
    params = policy.init(jax.random.key(0))
    one, other = direction(params, 1.0), direction(params, 1.0, seed=2)
    a, b = (entropy_derivative(policy, params, d, batch, 1.0) for d in (one, other))
    both = entropy_derivative(policy, params, jax.tree.map(lambda x, y: 2 * x - y, one, other), batch, 1.0)
    np.testing.assert_allclose(both, 2 * np.asarray(a) - np.asarray(b), atol=2e-5)
    nowhere = jax.tree.map(jnp.zeros_like, params)
    assert not np.any(entropy_derivative(policy, params, nowhere, batch, 1.0))


def test_the_transformer_and_its_tied_head_against_plain_logits():
    config = TransformerConfig(
        vocab_size=V, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_size=8, mlp_width=16
    )
    policy, batch = transformer(config), rows(temperature=True)
    params = jax.jit(policy.init)(jax.random.key(0))
    tangent, tau = direction(params, 1e-3), batch.token_data["temperature"][:, 1:]

    def plain(p):
        logits = policy.hidden(p, batch.tokens)[:, :-1] @ policy.unembed(p).T
        entropy = features.entropy(logits, temperature=tau)
        return jnp.where(batch.loss_mask, jnp.pad(entropy, ((0, 0), (1, 0))), 0.0)

    expected = jax.jit(lambda: jax.jvp(plain, (params,), (tangent,))[1])()
    found = jax.jit(lambda: entropy_derivative(policy, params, tangent, batch, 1.0))()
    assert float(jnp.abs(expected).max()) > 1e-5
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max()))
    parts = jax.jit(lambda: entropy_derivative(policy, params, tangent, batch, 1.0, num_microbatches=2))()
    np.testing.assert_allclose(parts, found, rtol=1e-5, atol=1e-9)


def test_no_array_of_rows_by_vocabulary_is_made():
    policy, batch = small_policy(jnp.float32), rows()
    params = policy.init(jax.random.key(0))
    big = jax.tree.map(lambda x: jax.ShapeDtypeStruct((50_000, D) if x.shape == (V, D) else x.shape, x.dtype), params)
    program = str(jax.make_jaxpr(lambda p, d: entropy_derivative(policy, p, d, batch, 1.0))(big, big))
    assert "[50000,24]" not in program and "[24,50000]" not in program and "[4,6,50000]" not in program

"""Features against float64, NumPy, the released code's numbers, and their invariants."""

import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jentropy import features

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("entropy", "log_normaliser", "varentropy")


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def families(rows=8, vocab_size=1000):
    """The logit families of a language model that break naive entropies, float64."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((rows, vocab_size))
    zipf = -1.5 * np.log(np.arange(1, vocab_size + 1))
    fork = np.where(np.arange(vocab_size) < 2, 20.0, 0.0)
    top = np.argsort(np.argsort(-normal, axis=1), axis=1) < 50
    return {
        "normal_1": normal,
        "normal_3": 3 * normal,
        "normal_10": 10 * normal,
        "zipf": rng.permuted(np.tile(zipf + 20, (rows, 1)), axis=1),
        "one_hot": np.where(np.arange(vocab_size) == 7, 30.0, 0.0) + 0.1 * normal,
        "fork": fork + normal,
        "near_uniform": 1e-3 * normal,
        "padded": np.where(np.arange(vocab_size) < vocab_size - 64, 3 * normal, -np.inf),
        "top_50": np.where(top, 3 * normal, -np.inf),
        "offset": 3 * normal + 1e4,
    }


@jax.jit
def score(logits, tokens):
    """(log_prob, entropy, gradient of the sum of entropies)."""
    entropy, vjp = jax.vjp(features.entropy, logits)
    return features.log_prob(logits, tokens), entropy, vjp(jnp.ones_like(entropy))[0]


@pytest.mark.parametrize("name", families())
def test_float32_agrees_with_float64(name):
    logits = np.float32(families()[name])
    tokens = np.argmax(logits, axis=1).astype(np.int32)
    tokens[::2] = np.argmin(np.where(np.isfinite(logits), logits, np.inf), axis=1)[::2]
    log_prob, entropy, grad = (np.asarray(x) for x in score(logits, tokens))
    assert log_prob.dtype == entropy.dtype == grad.dtype == np.float32
    with jax.enable_x64(True):
        exact_log_prob, exact_entropy, exact_grad = (np.asarray(x) for x in score(np.float64(logits), tokens))
    np.testing.assert_allclose(log_prob, exact_log_prob, atol=5e-6, rtol=1e-6)
    np.testing.assert_allclose(entropy, exact_entropy, atol=1e-5)
    assert np.linalg.norm(grad - exact_grad) <= 1e-5 * np.linalg.norm(exact_grad)


def test_values_by_hand():
    p = np.array([[0.5, 0.25, 0.125, 0.125], [0.25] * 4])
    z, z_other, ln2 = np.log(p) + 3.0, np.log(p[::-1]), np.log(2.0)
    with jax.enable_x64(True):
        cases = [
            (lambda z: features.entropy(z), [1.75 * ln2, 2 * ln2]),
            (lambda z: features.entropy(2 * z, temperature=jnp.array([2.0, 2.0])), [1.75 * ln2, 2 * ln2]),
            (lambda z: features.log_prob(z, jnp.array([0, 2])), [-ln2, -2 * ln2]),
            (lambda z: features.log_normaliser(z), [3.0, 3.0]),
            (lambda z: features.varentropy(z), [0.6875 * ln2**2, 0.0]),
            (lambda z: features.kl(z, jnp.asarray(z_other)), [0.25 * ln2, 0.25 * ln2]),
            (lambda z: features.nucleus_entropy(z, 0.5), [0.0, 2 * ln2]),
            (lambda z: features.nucleus_entropy(z, 0.7)[0], np.log(3) - 2 / 3 * ln2),  # {1/2, 1/4} holds 3/4
            (lambda z: features.nucleus_entropy(z, 0.8)[0], 1.75 * ln2),  # the two tied ids come together
        ]
        values = jax.jit(lambda z: [function(z) for function, _ in cases])(z)
    for value, (_, expected) in zip(values, cases):
        np.testing.assert_allclose(value, expected, rtol=1e-14, atol=1e-15)


def test_entropy_agrees_with_the_released_code():
    data = golden("entropy_from_logits")
    tokens = np.zeros(data["logits"].shape[:-1], np.int32)
    rounded = np.float32(data["logits"])
    with jax.enable_x64(True):
        _, entropy, grad = score(data["logits"], tokens)
        exact = np.asarray(score(np.float64(rounded), tokens)[1])
    np.testing.assert_allclose(entropy, data["trl_H_f64"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad, data["verl_grad_sumH_f64"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(score(rounded, tokens)[1], exact, atol=1e-5)
    # The released code's own float32 error is 1.1e-3 on these rows (logits of size 1e4).
    assert np.abs(data["verl_H_f32"] - exact).max() > 1e-4


def test_bfloat16_logits_are_computed_in_float32():
    data = golden("entropy_from_logits_bf16")
    entropy = features.entropy(jnp.asarray(data["logits_bf16_as_f32"], jnp.bfloat16))
    assert entropy.dtype == jnp.float32
    np.testing.assert_allclose(entropy, data["H_f64_of_rounded"], atol=1e-5)


def test_infinite_logits_give_the_entropy_of_the_support():
    data = golden("entropy_from_logits_neginf")  # the released code gives NaN
    with jax.enable_x64(True):
        _, entropy, grad = score(data["logits"], np.zeros((1, 7), np.int32))
    np.testing.assert_allclose(entropy, data["expected_H"], rtol=1e-12)
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[np.isinf(data["logits"])] == 0).all()


def test_kl_agrees_with_autograd_of_the_reference():
    data = golden("base_klfull_0")

    @jax.jit
    def evaluate(z, ref):
        functions = (lambda z: features.kl(z, ref), lambda z: features.kl(ref, z), features.entropy)
        results = [jax.vjp(function, z) for function in functions]
        return [(value, vjp(jnp.ones_like(value))[0]) for value, vjp in results]

    with jax.enable_x64(True):
        results = evaluate(data["logits"], data["ref_logits"])
    for name, (value, grad) in zip(("reverse_kl", "forward_kl", "entropy"), results):
        np.testing.assert_allclose(value, data[name], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(grad, data[f"grad_{name}"], rtol=1e-12, atol=1e-12)


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        z = jax.random.normal(jax.random.key(0), (3, 6)) * 2
        tokens, mask = jnp.array([0, 3, 5]), jnp.array([True, True, False, True, True, True])
        options = {"temperature": jnp.array([0.7, 1.0, 1.5]), "vocab_mask": mask}

        @jax.jit
        def everything(z):
            values = [getattr(features, name)(z, **options) for name in NAMES]
            log_prob, kl = features.log_prob(z, tokens, **options), features.kl(z, z[::-1] * 0.5, **options)
            return jnp.stack([*values, log_prob, kl, features.nucleus_entropy(z, 0.8, **options)])

        check_grads(everything, (z,), 1, modes=["rev"])
        # The entropy has a derivative rule of its own: its second derivative goes through the rule.
        check_grads(jax.jit(lambda z: features.entropy(z, **options)), (z,), 2, modes=["rev"])


@jax.jit
def _masked(z, mask, tokens):
    """Every feature under a mask `[5, B]`, the log-probs `[B]`, and the gradient of their sum."""
    options = {"vocab_mask": mask}

    def everything(z):
        values = [getattr(features, name)(z, **options) for name in NAMES]
        values += [features.nucleus_entropy(z, 0.7, **options), features.kl(z, z[::-1], **options)]
        return jnp.stack(values), features.log_prob(z, tokens, **options)

    values, vjp = jax.vjp(everything, z)
    return *values, vjp(jax.tree.map(jnp.ones_like, values))[0]


def test_illegal_ids_have_no_influence():
    z = np.float32(np.random.default_rng(0).standard_normal((4, 9)))
    mask = np.arange(9) % 3 != 1
    tokens = np.array([0, 1, 8, -1], np.int32)  # legal, illegal, legal, outside
    garbage = np.where(mask, z, np.float32([[np.nan], [np.inf], [-np.inf], [1e30]]))
    values, log_prob, grad = _masked(z, mask, tokens)
    for actual, expected in zip(_masked(garbage, mask, tokens), (values, log_prob, grad)):
        np.testing.assert_array_equal(actual, expected)
    small = _masked(z[:, mask], np.ones(6, bool), np.array([0, 0, 5, 0], np.int32))
    np.testing.assert_allclose(values, small[0], atol=1e-6)
    np.testing.assert_allclose(log_prob[::2], small[1][::2], atol=1e-6)
    np.testing.assert_array_equal(log_prob[1::2], np.float32(features.LOG_ZERO))
    assert np.isfinite(grad).all() and not np.asarray(grad)[:, ~mask].any()


def test_rows_without_a_legal_id_are_finite():
    values, log_prob, grad = _masked(np.full((4, 9), -np.inf, np.float32), np.ones(9, bool), np.zeros(4, np.int32))
    expected = np.zeros((5, 4), np.float32)
    expected[NAMES.index("log_normaliser")] = features.LOG_ZERO
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(log_prob, np.float32(features.LOG_ZERO))
    np.testing.assert_array_equal(grad, 0.0)


def test_kl_is_huge_and_finite_where_q_has_no_mass():
    value, grads = jax.jit(jax.value_and_grad(lambda p, q: features.kl(p, q)[0], (0, 1)))(
        jnp.zeros((1, 3)), jnp.array([[0.0, 0.0, -jnp.inf]])
    )
    assert 1e29 < value < jnp.inf
    assert np.isfinite(grads).all()


@jax.jit
def _nucleus(z, mass):
    return features.nucleus_mask(z, mass), features.nucleus_entropy(z, mass)


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.8, 0.95, 1.0])
def test_nucleus_agrees_with_sorting(mass):
    with jax.enable_x64(True):
        z = np.concatenate([s * np.random.default_rng(1).standard_normal((5, 40)) for s in (0.1, 1.0, 4.0)])
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        kept, entropy = (np.asarray(x) for x in _nucleus(z, mass))
        for p_row, kept_row in zip(p, kept):
            size = np.searchsorted(np.cumsum(np.sort(p_row)[::-1]), mass - 1e-12) + 1
            assert set(np.flatnonzero(kept_row)) == set(np.argsort(-p_row)[:size])
        inside = np.where(kept, p, 0.0) / np.where(kept, p, 0.0).sum(1, keepdims=True)
        expected = -(inside * np.log(np.where(kept, inside, 1.0))).sum(1)
        np.testing.assert_allclose(entropy, expected, atol=1e-13)


@jax.jit
def _released(z, mass):
    entropy, vjp = jax.vjp(lambda z: features.nucleus_entropy_released(z, mass), z)
    return entropy, vjp(jnp.ones_like(entropy))[0]


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.8, 0.95])
def test_released_nucleus_drops_the_id_that_crosses_the_mass(mass):
    with jax.enable_x64(True):
        z = np.concatenate([s * np.random.default_rng(1).standard_normal((5, 40)) for s in (0.1, 1.0, 4.0)])
        z[0], z[1, :30] = 0.0, 2.0  # ties: as many as stay below the mass
        entropy, grad = (np.asarray(x) for x in _released(z, mass))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    sizes = [np.sum(np.cumsum(np.sort(row)[::-1]) < mass - 1e-12) for row in p]
    kept = [np.sort(row)[::-1][:size] for row, size in zip(p, sizes)]
    expected = [-np.sum(q / q.sum() * np.log(q / q.sum())) for q in kept]
    np.testing.assert_allclose(entropy, expected, atol=1e-13)
    np.testing.assert_allclose(grad.sum(1), 0.0, atol=1e-13)
    empty = np.array(sizes) == 0
    assert mass > 0.5 or empty.any()
    assert not entropy[empty].any() and not grad[empty].any()
    outside = p < np.array([q[-1] if q.size else 1.0 for q in kept])[:, None]
    assert not grad[outside & (np.arange(15) > 1)[:, None]].any()


def test_nucleus_keeps_nan():
    z = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 0.5, 1.0]])
    for function in (features.nucleus_entropy, features.nucleus_entropy_released):
        np.testing.assert_array_equal(np.isnan(function(z, 0.9)), [True, False])


@pytest.mark.parametrize("function", [features.nucleus_entropy, features.nucleus_entropy_released])
def test_nucleus_mass_is_checked(function):
    with pytest.raises(ValueError, match=r"mass.*1\.5"):
        function(jnp.zeros((1, 3)), 1.5)


logits_strategy = st.builds(
    lambda seed, scale, offset, illegal, ties: _random_logits(seed, scale, offset, illegal, ties),
    st.integers(0, 2**31),
    st.sampled_from([1e-4, 1e-2, 1.0, 10.0, 100.0]),
    st.sampled_from([0.0, 1e4, -1e4]),
    st.floats(0.0, 0.95),
    st.booleans(),
)


def _random_logits(seed, scale, offset, illegal, ties):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((4, 64)) * scale
    z = np.round(z) if ties else z
    legal = rng.random((4, 64)) >= illegal
    legal[:, 5] = True
    return np.float32(np.where(legal, z + offset, -np.inf))


@jax.jit
def _all(z):
    tokens = jnp.full(z.shape[:1], 5)
    nucleus = features.nucleus_entropy(z, 0.8), features.nucleus_entropy_released(z, 0.8)
    return features.entropy(z), features.log_prob(z, tokens), features.varentropy(z), *nucleus


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(logits_strategy)
def test_bounds(z):
    entropy, log_prob, varentropy, nucleus, released = _all(z)
    upper = np.log(np.isfinite(z).sum(1)) + 1e-5
    for value, bound in ((entropy, upper), (nucleus, entropy), (released, nucleus)):
        assert (np.asarray(value) >= 0).all() and (np.asarray(value) <= np.asarray(bound) + 1e-5).all()
    assert (np.asarray(log_prob) <= 0).all() and np.isfinite(log_prob).all() and (np.asarray(varentropy) >= 0).all()


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(logits_strategy, st.sampled_from([-8.0, 0.5, 1024.0]))
def test_shift_invariance(z, shift):
    shifted = z + np.float32(shift)
    hypothesis.assume(np.array_equal(shifted - np.float32(shift), z, equal_nan=True))  # the shift itself was exact
    for a, b in zip(_all(z), _all(shifted)):
        np.testing.assert_array_equal(a, b)

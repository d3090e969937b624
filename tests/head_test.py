"""The fused head against features on the whole logits: values, gradients, chunks, masks, memory."""

import os
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from features_test import families
from jax.test_util import check_grads

from jentropy import features, head, vocabulary

GOLDEN = pathlib.Path(__file__).parent / "golden"
V = 29


def problem(dtype=np.float64, seed=0):
    """Hidden states [2, 3, D], unembedding, tokens, bias, mask (29 ids, 20 legal), temperature [2, 3]."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    mask = np.arange(V) % 3 != 1
    tokens = jnp.asarray([[0, 2, 3], [5, 28, 1]], jnp.int32)  # the last one is illegal under the mask
    temperature = jnp.asarray(rng.uniform(0.5, 2.0, (2, 3)), dtype)
    return draw(2, 3, 8), draw(V, 8), tokens, draw(V), jnp.asarray(mask), temperature


def dense_scores(hidden, unembed, tokens, *, temperature=1.0, bias=None, vocab_mask=None):
    logits = jnp.einsum("...d,vd->...v", hidden, unembed, precision="highest")
    logits = logits if bias is None else logits + jnp.broadcast_to(bias, logits.shape)
    options = {"temperature": temperature, "vocab_mask": vocab_mask}
    return head.Scores(
        features.log_prob(logits, tokens, **options),
        features.entropy(logits, **options),
        features.log_normaliser(logits, **options),
    )


def dense_pair(h, w, h_other, w_other, **options):
    z, z_other = jnp.einsum("...d,vd->...v", h, w), jnp.einsum("...d,vd->...v", h_other, w_other)
    return (
        features.kl(z, z_other, **options),
        features.kl(z_other, z, **options),
        features.entropy(z, **options),
    )


def weighted(scores):
    """A scalar in which every entry of every result has its own weight."""
    return sum(
        (jnp.sin(jnp.arange(x.size, dtype=x.dtype) + k).reshape(x.shape) * x).sum() for k, x in enumerate(scores)
    )


def assert_trees_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_chunks, masked", [(None, True), (4, False), (29, True)])
def test_agrees_with_features_in_float64(num_chunks, masked):
    with jax.enable_x64(True):
        h, w, tokens, bias, mask, temperature = problem()
        options = {"temperature": temperature, "vocab_mask": mask if masked else None}
        weight = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0 if masked else 1.0]])  # LOG_ZERO would drown the sum

        def evaluate(function, **more):
            def loss(h, w, bias):
                scores = function(h, w, tokens, bias=bias, **options, **more)
                return weighted(scores._replace(log_prob=weight * scores.log_prob)), scores

            (_, scores), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(h, w, bias)
            return scores, grads

        actual, expected = evaluate(head.linear_scores, num_chunks=num_chunks), evaluate(dense_scores)
        assert_trees_close(actual, expected, 1e-12)
        if masked:
            assert actual[0].log_prob[1, 2] == features.LOG_ZERO
            assert not np.asarray(actual[1][1])[~np.asarray(mask)].any()


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_pair_agrees_with_features_in_float64(num_chunks):
    with jax.enable_x64(True):
        h, w, _, _, mask, temperature = problem()
        other = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 5)))
        w_other = jnp.asarray(np.random.default_rng(2).standard_normal((V, 5)))
        options = {"temperature": temperature, "vocab_mask": mask}

        def fused(*arrays):
            kl, reverse_kl, _, entropy = head.pair_scores(*arrays, num_chunks=num_chunks, **options)
            return weighted((kl, reverse_kl, entropy)), (kl, reverse_kl, entropy)

        def dense(*arrays):
            scores = dense_pair(*arrays, **options)
            return weighted(scores), scores

        arguments = (h, w, other, w_other)
        evaluate = lambda f: jax.jit(jax.value_and_grad(f, range(4), has_aux=True))(*arguments)  # noqa: E731
        assert_trees_close(evaluate(fused), evaluate(dense), 1e-12)


def test_pair_covariance():
    with jax.enable_x64(True):
        h, w, _, _, mask, temperature = problem()
        pair = jax.jit(
            lambda a, b: head.pair_scores(a, w, b, w, temperature=temperature, vocab_mask=mask, num_chunks=4)
        )
        scores = pair(h, h + 0.3)
        z, dz = (np.asarray(x @ w.T / temperature[..., None])[..., mask] for x in (h, jnp.full_like(h, 0.3)))
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        expected = (p * np.log(p) * dz).sum(-1) - (p * np.log(p)).sum(-1) * (p * dz).sum(-1)
        np.testing.assert_allclose(scores.covariance, expected, rtol=1e-12, atol=1e-12)
        small, after = pair(h, h + 1e-4), pair(h + 1e-4, h).entropy
        np.testing.assert_allclose(after - small.entropy, -small.covariance, atol=1e-6)  # Lemma 1, to first order
        grad = jax.jit(jax.grad(lambda h: pair(h, h + 0.3).covariance.sum()))(h)
        np.testing.assert_array_equal(grad, 0.0)


def test_pair_agrees_with_autograd_of_the_reference():
    data = np.load(GOLDEN / "base_klfull_0.npz")
    fields = {"reverse_kl": "kl", "forward_kl": "reverse_kl", "entropy": "entropy"}  # the file's names, ours
    with jax.enable_x64(True):
        reference, eye = jnp.asarray(data["ref_logits"]), jnp.eye(7)

        @jax.jit
        def evaluate(z):
            scores, vjp = jax.vjp(lambda z: head.pair_scores(z, eye, reference, eye), z)
            none = jax.tree.map(jnp.zeros_like, scores)
            one = jnp.ones_like(scores.kl)
            return scores, {x: vjp(none._replace(**{x: one}))[0] for x in fields.values()}

        scores, grads = evaluate(jnp.asarray(data["logits"]))
    for name, field in fields.items():
        np.testing.assert_allclose(getattr(scores, field), data[name], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(grads[field], data[f"grad_{name}"], rtol=1e-12, atol=1e-12)


def test_pair_of_close_distributions_keeps_its_relative_accuracy():
    rng = np.random.default_rng(0)
    h, w = (np.float32(rng.standard_normal(shape)) for shape in ((6, 8), (V, 8)))
    other = h + np.float32(2e-4) * np.sin(np.arange(48, dtype=np.float32)).reshape(h.shape)
    pair = jax.jit(head.pair_scores)
    scores, same = pair(h, w, other, w), pair(h, w, h, w)
    with jax.enable_x64(True):
        exact = pair(*(np.float64(x) for x in (h, w, other, w)))
    assert (np.asarray(exact.kl) < 1e-6).all()
    for name in ("kl", "reverse_kl", "covariance"):
        np.testing.assert_allclose(getattr(scores, name), getattr(exact, name), rtol=1e-2, atol=2e-10)
        np.testing.assert_array_equal(getattr(same, name), 0.0)


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        h, w, tokens, bias, mask, temperature = problem()
        options = {"temperature": temperature, "vocab_mask": mask, "num_chunks": 4}
        tokens = jnp.zeros_like(tokens)
        loss = jax.jit(lambda h, w, b: weighted(head.linear_scores(h, w, tokens, bias=b, **options)))
        check_grads(loss, (h, w, bias), 1, modes=["rev"])
        pair = jax.jit(lambda *x: weighted(head.pair_scores(*x, **options)[:2]))
        check_grads(pair, (h, w, h[::-1], w * 0.5), 1, modes=["rev"])


@jax.jit
def _fused(logits, tokens, mask):
    eye = jnp.eye(logits.shape[1], dtype=logits.dtype)
    score = lambda z: head.linear_scores(z, eye, tokens, vocab_mask=mask, num_chunks=8)  # noqa: E731
    scores, vjp = jax.vjp(score, logits)
    zero = jnp.zeros_like(scores.entropy)
    return scores.log_prob, scores.entropy, vjp(head.Scores(zero, jnp.ones_like(zero), zero))[0]


@jax.jit
def _dense(logits, tokens, mask):
    entropy, vjp = jax.vjp(lambda z: features.entropy(z, vocab_mask=mask), logits)
    return features.log_prob(logits, tokens, vocab_mask=mask), entropy, vjp(jnp.ones_like(entropy))[0]


@pytest.mark.parametrize("name", families())
def test_float32_agrees_with_float64(name):
    z = families()[name]
    mask = np.isfinite(z[0])  # one mask for all rows; illegal ids get a logit that would win
    logits = np.float32(np.where(mask, np.where(np.isfinite(z), z, 0.0), 60.0))
    tokens = np.argmax(np.where(mask, logits, -np.inf), axis=1).astype(np.int32)
    tokens[::2] = np.argmin(np.where(mask, logits, np.inf), axis=1)[::2]
    log_prob, entropy, grad = (np.asarray(x) for x in _fused(logits, tokens, mask))
    with jax.enable_x64(True):
        exact_log_prob, exact_entropy, exact_grad = (np.asarray(x) for x in _dense(np.float64(logits), tokens, mask))
    np.testing.assert_allclose(log_prob, exact_log_prob, atol=5e-6, rtol=1e-6)
    np.testing.assert_allclose(entropy, exact_entropy, atol=1e-5)
    assert np.linalg.norm(grad - exact_grad) <= 1e-5 * np.linalg.norm(exact_grad)


def test_float32_gradients_and_chunks():
    h, w, tokens, bias, mask, temperature = problem(np.float32)
    tokens = jnp.zeros_like(tokens)

    def grads(num_chunks):
        loss = lambda h, w, b: weighted(  # noqa: E731
            head.linear_scores(h, w, tokens, bias=b, vocab_mask=mask, temperature=temperature, num_chunks=num_chunks)
        )
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(h, w, bias)

    assert_trees_close(grads(7), grads(1), 3e-6)


@jax.jit
def _with_unit_cotangents(h, w, tokens, mask):
    scores, vjp = jax.vjp(lambda h, w: head.linear_scores(h, w, tokens, vocab_mask=mask, num_chunks=3), h, w)
    one, zero = jnp.ones_like(scores.entropy), jnp.zeros_like(scores.entropy)
    return scores, vjp(head.Scores(one, one, one)), vjp(head.Scores(one, zero, zero))


def test_tokens_outside_the_vocabulary():
    h, w, *_ = problem(np.float32)
    tokens = np.asarray([[-1, V, 0], [-V, 2**31 - 1, 1]], np.int32)
    scores, grads, grads_log_prob = _with_unit_cotangents(h, w, tokens, np.ones(V, bool))
    outside = (tokens < 0) | (tokens >= V)
    np.testing.assert_array_equal(scores.log_prob[outside], np.float32(features.LOG_ZERO))
    assert (np.asarray(scores.log_prob)[~outside] > -100).all()
    assert all(np.isfinite(x).all() for x in grads)
    np.testing.assert_array_equal(grads_log_prob[0][outside], 0.0)


def test_no_legal_id_is_finite():
    h, w, tokens, *_ = problem(np.float32)
    scores, grads, _ = _with_unit_cotangents(h, w, tokens, np.zeros(V, bool))
    np.testing.assert_array_equal(scores.entropy, 0.0)
    np.testing.assert_array_equal(scores.log_prob, np.float32(features.LOG_ZERO))
    for grad in grads:
        np.testing.assert_array_equal(grad, 0.0)


def test_bfloat16_hidden_states():
    h, w, tokens, *_ = problem(np.float32)
    h16 = h.astype(jnp.bfloat16)

    def loss(h, w):
        scores = head.linear_scores(h, w, tokens, num_chunks=4)
        return weighted(scores), scores

    evaluate = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, scores), grads = evaluate(h16, w)
    assert {x.dtype for x in scores} == {jnp.dtype(jnp.float32)}
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (h, w)]  # the only rounding of the forward pass
    (_, expected), expected_grads = evaluate(*rounded)
    assert_trees_close(scores, expected, 1e-5)
    for a, b in zip(grads, expected_grads):
        assert np.linalg.norm(np.float32(a) - b) <= 1e-2 * np.linalg.norm(b)
    assert jnp.isfinite(jax.jit(head.pair_scores)(h16, w, h, w).kl).all()


def test_temperature_is_not_differentiated():
    h, w, tokens, *_ = problem(np.float32)
    grad = jax.jit(jax.grad(lambda t: head.linear_scores(h, w, tokens, temperature=t).entropy.sum()))
    np.testing.assert_array_equal(grad(jnp.full((2, 3), 0.7)), 0.0)


def test_no_array_of_the_whole_logits():
    n, v, d = 512, 49152, 64
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, d), (v, d))]
    tokens = jnp.zeros(n, jnp.int32)
    assert vocabulary.default_num_chunks(n, v) == 12
    linear = jax.grad(lambda h, w: weighted(head.linear_scores(h, w, tokens)), (0, 1))
    pair = jax.grad(lambda h, w: weighted(head.pair_scores(h, w, h * 2.0, w)), (0, 1))
    for function, limit in ((linear, n * v * 4 / 5), (pair, n * v * 4 / 2)):  # bytes; V · D alone is an eighth
        memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
        assert memory.temp_size_in_bytes < limit
    saved = jax.eval_shape(lambda h, w: jax.vjp(lambda h, w: head.linear_scores(h, w, tokens), h, w)[1], *shapes)
    assert sum(x.size for x in jax.tree.leaves(saved)) <= n * d + v * d + 8 * n


@pytest.mark.parametrize("n, v, expected", [(3584, 16, 1), (65536, 4096, 1), (20, 50257, 1), (8192, 151936, 64)])
def test_default_number_of_chunks(n, v, expected):
    assert vocabulary.default_num_chunks(n, v) == expected


def test_number_of_chunks_is_checked():
    h, w, tokens, *_ = problem(np.float32)
    with pytest.raises(ValueError, match=r"num_chunks.*got 30"):
        head.linear_scores(h, w, tokens, num_chunks=30)


PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jentropy import head
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
arguments = (
    place((8, 4, 16), jnp.float32, "data"), place((256, 16), jnp.float32, "tensor"), place((8, 4), jnp.int32, "data")
)
def loss(h, w, tokens):
    a, b = head.linear_scores(h, w, tokens, num_chunks=4), head.pair_scores(h, w, 2.0 * h, w, num_chunks=4)
    return a.log_prob.sum() + a.entropy.sum() + b.kl.sum()
out = (NamedSharding(mesh, P("data")), NamedSharding(mesh, P("tensor")))
text = jax.jit(jax.grad(loss, (0, 1)), out_shardings=out).lower(*arguments).compile().as_text()
assert "all-reduce" in text
assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute")), text
"""


def run_on_eight_devices(program):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, check=True, timeout=300)


def test_a_sharded_vocabulary_is_never_gathered():
    run_on_eight_devices(PROGRAM)


@jax.jit
def _random_scores(h, w, tokens, mask):
    options = {"vocab_mask": mask}
    pair = head.pair_scores(h, w, h[::-1], w, num_chunks=5, **options)
    chunked = head.linear_scores(h, w, tokens, num_chunks=5, **options)
    shifted = head.linear_scores(h, w, tokens, bias=jnp.full(w.shape[0], 2.0), num_chunks=2, **options)
    return head.linear_scores(h, w, tokens, **options), chunked, shifted, pair


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 10.0, 100.0]), st.floats(0.0, 0.95))
def test_bounds_and_invariances(seed, scale, illegal):
    rng = np.random.default_rng(seed)
    h, w = (np.float32(rng.standard_normal(shape) * scale**0.5) for shape in ((6, 4), (64, 4)))
    mask = rng.random(64) >= illegal
    mask[5] = True
    whole, chunked, shifted, pair = _random_scores(h, w, np.full(6, 5, np.int32), mask)
    for scores in (whole, chunked):
        assert (np.asarray(scores.entropy) >= 0).all() and (
            np.asarray(scores.entropy) <= np.log(mask.sum()) + 1e-5
        ).all()
        assert (np.asarray(scores.log_prob) <= 0).all() and np.isfinite(scores.log_prob).all()
    assert (np.asarray(pair.kl) >= 0).all() and (np.asarray(pair.reverse_kl) >= 0).all()
    size = 1.0 + np.abs(h @ w.T).max()
    assert_trees_close(chunked, whole, 2e-6 * size)
    assert_trees_close(shifted[:2], whole[:2], 2e-6 * size)
    np.testing.assert_allclose(shifted.log_normaliser - 2.0, whole.log_normaliser, atol=2e-6 * size)

"""Nucleus entropies of the fused head against features, sorting, float64; chunks, masks, memory, sharding."""

import contextlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from features_test import families
from head_test import V, assert_trees_close, problem, run_on_eight_devices, weighted
from jax.test_util import check_grads

from jentropy import features, head, nucleus, vocabulary
from jentropy.nucleus import NucleusKind

BOTH = (NucleusKind(0.8), NucleusKind(0.8, released=True))
KINDS = (*BOTH, NucleusKind(1.0), NucleusKind(0.3, released=True))


@contextlib.contextmanager
def compiler(quick):
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def with_ties(unembed):
    """The last five ids score as the first five do."""
    return jnp.concatenate([unembed[:-5], unembed[:5]])


def dense(hidden, unembed, kinds, *, bias=None, **options):
    logits = jnp.einsum("...d,vd->...v", hidden, unembed, precision="highest")
    logits = logits if bias is None else logits + jnp.broadcast_to(bias, logits.shape)
    functions = {False: features.nucleus_entropy, True: features.nucleus_entropy_released}
    return tuple(functions[released](logits, mass, **options) for mass, released in kinds)


@pytest.mark.parametrize(
    "num_chunks, num_blocks, masked", [(None, None, True), (4, 1, False), (5, 4, True), (29, 6, True)]
)
def test_agrees_with_features_in_float64(num_chunks, num_blocks, masked):
    with jax.enable_x64(True):
        h, w, _, bias, mask, temperature = problem()
        options = {"temperature": temperature, "vocab_mask": mask if masked else None}

        def evaluate(function, **more):
            def loss(h, w, bias):
                scores = function(h, w, KINDS, bias=bias, **options, **more)
                return weighted(scores), scores

            return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(h, with_ties(w), bias)

        actual = evaluate(nucleus.nucleus_entropies, num_chunks=num_chunks, num_blocks=num_blocks)
        assert_trees_close(actual, evaluate(dense), 1e-12)
        if masked:
            assert not np.asarray(actual[1][1])[~np.asarray(mask)].any()


def by_sorting(p, mass, released):
    """Entropy of the sorted ids up to the one that crosses the mass, which the released code drops."""
    order = np.sort(p)[::-1]
    crossing = np.searchsorted(np.cumsum(order), mass)
    if not released:
        crossing += np.sum(order[crossing:] == order[crossing])  # with all that are tied with it
    q = order[:crossing] / order[:crossing].sum()
    return -(q * np.log(q)).sum()


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_agrees_with_sorting(num_blocks):
    rng = np.random.default_rng(3)
    scale = np.array([0.1, 1.0, 1.0, 3.0, 10.0, 30.0])[:, None]
    logits = np.round(2.0 * scale * rng.standard_normal((6, 64))) / 2.0  # ids tie, at the crossing too
    logits[1] = 0.0
    kinds = tuple(NucleusKind(mass, released) for mass in (0.21, 0.53, 0.9) for released in (False, True))
    with jax.enable_x64(True):
        entropies = jax.jit(lambda z: nucleus.nucleus_entropies(z, jnp.eye(64), kinds, num_blocks=num_blocks))(logits)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert sum(np.sum(np.diff(np.sort(row)) == 0) for row in p) > 100
    for entropy, kind in zip(entropies, kinds):
        expected = [by_sorting(row, *kind) for row in p]
        np.testing.assert_allclose(entropy, expected, rtol=1e-12, atol=1e-12, err_msg=str(kind))


@jax.jit
def _fused(logits, mask):
    options = {"vocab_mask": mask, "num_chunks": 8, "num_blocks": 3}
    score = lambda z: nucleus.nucleus_entropies(z, jnp.eye(z.shape[1], dtype=z.dtype), BOTH, **options)  # noqa: E731
    entropies, vjp = jax.vjp(score, logits)
    zero, one = jnp.zeros_like(entropies[0]), jnp.ones_like(entropies[0])
    return entropies, vjp((one, zero))[0], vjp((zero, one))[0]


@jax.jit
def _dense(logits, mask):
    entropies, vjp = jax.vjp(lambda z: dense(z, jnp.eye(z.shape[1]), BOTH, vocab_mask=mask), logits)
    zero, one = jnp.zeros_like(entropies[0]), jnp.ones_like(entropies[0])
    return entropies, vjp((one, zero))[0], vjp((zero, one))[0]


@pytest.mark.parametrize("name", families())
def test_float32_agrees_with_float64(name):
    z = families()[name]
    mask = np.isfinite(z[0])  # one mask for all rows; illegal ids get a logit that would win
    logits = np.float32(np.where(mask, np.where(np.isfinite(z), z, 0.0), 60.0))
    entropies, *grads = _fused(logits, mask)
    with jax.enable_x64(True):
        exact, *exact_grads = jax.tree.map(np.asarray, _dense(np.float64(logits), mask))
    np.testing.assert_allclose(entropies, exact, atol=2e-5)
    for grad, exact_grad in zip(grads, exact_grads):
        assert np.linalg.norm(grad - exact_grad) <= 2e-5 * np.linalg.norm(exact_grad) + 1e-12


def test_values_by_hand():
    p, ln2 = np.float32([[1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 4] * 4, [15 / 16, 1 / 48, 1 / 48, 1 / 48]]), np.log(2.0)
    two, three, four = (
        np.log(3) - 2 / 3 * ln2,
        np.log(7) - 10 / 7 * ln2,
        1.75 * ln2,
    )  # most probable ids of the first row
    expected = {
        NucleusKind(0.7): [two, 2 * ln2, 0.0],
        NucleusKind(0.8): [four, 2 * ln2, 0.0],  # the two tied ids come together
        NucleusKind(0.8, released=True): [two, np.log(3), 0.0],
        NucleusKind(0.9, released=True): [three, np.log(3), 0.0],  # one of the two tied ids; the last row has none
    }
    found = jax.jit(lambda z: nucleus.nucleus_entropies(z, jnp.eye(4), tuple(expected)))(np.log(p))
    np.testing.assert_allclose(found, list(expected.values()), atol=1e-6)


def test_all_the_mass_is_the_entropy_and_one_id_has_none():
    h, w, *_ = problem(np.float32)
    entropy = jax.jit(lambda h: head.linear_scores(h, w, jnp.zeros((2, 3), jnp.int32)).entropy)(h)
    everything, vjp = jax.vjp(jax.jit(lambda h: nucleus.nucleus_entropies(h, w, (NucleusKind(1.0),))[0]), h)
    np.testing.assert_allclose(everything, entropy, atol=1e-5)
    assert np.any(vjp(jnp.ones_like(entropy))[0])
    peaked, vjp = jax.vjp(jax.jit(lambda h: nucleus.nucleus_entropies(h, w, BOTH)), 1e3 * h)
    np.testing.assert_array_equal(peaked, 0.0)
    np.testing.assert_array_equal(vjp(peaked)[0], 0.0)
    np.testing.assert_array_equal(vjp(tuple(x + 1.0 for x in peaked))[0], 0.0)


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        h, w, _, bias, mask, temperature = problem()
        options = {"temperature": temperature, "vocab_mask": mask, "num_chunks": 4, "num_blocks": 2}
        loss = jax.jit(lambda h, w, b: weighted(nucleus.nucleus_entropies(h, w, BOTH, bias=b, **options)))
        check_grads(loss, (h, w, bias), 1, modes=["rev"])


def test_gradient_of_tied_ids_is_the_mean_over_the_choices():
    """Three ids tie where the mass is crossed; two of them stay below it."""
    z, mass = np.array([[2.0, 1.0, 1.0, 1.0, -1.0]]), 0.9
    with jax.enable_x64(True):
        kind = (NucleusKind(mass, released=True),)
        value, grad = jax.jit(jax.value_and_grad(lambda z: nucleus.nucleus_entropies(z, jnp.eye(5), kind)[0][0]))(z)
        choose = jax.jit(jax.value_and_grad(lambda z, mask: features.entropy(z, vocab_mask=mask)[0]))
        chosen = [choose(z, np.isin(np.arange(5), (0, *pair))[None, :]) for pair in ((1, 2), (1, 3), (2, 3))]
    np.testing.assert_allclose(value, chosen[0][0], rtol=1e-12)
    np.testing.assert_allclose(grad, np.mean([g for _, g in chosen], axis=0), rtol=1e-12, atol=1e-16)


def test_the_set_survives_rounding():
    """The bounds stand between neighbours: other float32 logits of the same numbers give the same nucleus."""
    rng = np.random.default_rng(0)
    weight = np.exp(-rng.exponential(5.0, (64, 500)).astype(np.float32))
    for released in (False, True):
        found = features.find_nucleus(weight, jnp.float32(0.8), released=released)
        kept = found.keep(weight)
        for factor in (1 - 3e-7, 1 + 3e-7):
            np.testing.assert_array_equal(found.keep(weight * np.float32(factor)), kept)


@jax.jit
def _with_unit_cotangents(h, w, mask):
    options = {"vocab_mask": mask, "num_chunks": 3, "num_blocks": 3}
    entropies, vjp = jax.vjp(lambda h, w: nucleus.nucleus_entropies(h, w, BOTH, **options), h, w)
    return entropies, vjp(jax.tree.map(jnp.ones_like, entropies))


def test_no_legal_id_is_finite():
    h, w, *_ = problem(np.float32)
    entropies, grads = _with_unit_cotangents(h, w, np.zeros(V, bool))
    for x in (*entropies, *grads):
        np.testing.assert_array_equal(x, 0.0)


def test_nan_stays_in_its_row():
    h, w, *_ = problem(np.float32)
    clean, _ = _with_unit_cotangents(h, w, np.ones(V, bool))
    dirty, _ = _with_unit_cotangents(h.at[1, 1].set(np.nan), w, np.ones(V, bool))
    nan = np.zeros((2, 3), bool)
    nan[1, 1] = True
    for a, b in zip(clean, dirty):
        np.testing.assert_array_equal(b, np.where(nan, np.nan, a))


def test_bfloat16_hidden_states():
    h, w, *_ = problem(np.float32)
    h16 = h.astype(jnp.bfloat16)
    entropies, grads = _with_unit_cotangents(h16, w, np.ones(V, bool))
    assert {x.dtype for x in entropies} == {jnp.dtype(jnp.float32)}
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (h, w)]  # the only rounding of the forward pass
    expected, expected_grads = _with_unit_cotangents(*rounded, np.ones(V, bool))
    assert_trees_close(entropies, expected, 1e-5)
    for a, b in zip(grads, expected_grads):
        assert np.linalg.norm(np.float32(a) - b) <= 1e-2 * np.linalg.norm(b)


def test_temperature_is_not_differentiated():
    h, w, *_ = problem(np.float32)
    grad = jax.jit(jax.grad(lambda t: nucleus.nucleus_entropies(h, w, BOTH, temperature=t)[0].sum()))
    np.testing.assert_array_equal(grad(jnp.full((2, 3), 0.7)), 0.0)


def _sizes(jaxpr):
    """Sizes of all arrays of a program, inner ones too."""
    for equation in jaxpr.eqns:
        yield from (x.aval.size for x in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _sizes(inner)


def test_no_array_of_the_whole_logits():
    n, v, d = 512, 49152, 64
    h, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, d), (v, d)))
    assert vocabulary.default_num_chunks(n, v, chunk_size=2048) == 24
    function = jax.grad(lambda h, w: weighted(nucleus.nucleus_entropies(h, w, BOTH)), (0, 1))
    whole = jax.grad(lambda h, w: weighted(nucleus.nucleus_entropies(h, w, BOTH, num_chunks=1)), (0, 1))
    assert max(_sizes(jax.make_jaxpr(whole)(h, w).jaxpr)) == n * v
    assert max(_sizes(jax.make_jaxpr(function)(h, w).jaxpr)) == d * v == n * v // 8
    with compiler(quick=False):
        memory = jax.jit(function).lower(h, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * v * 4 / 2  # bytes; V · D alone is an eighth
    saved = jax.eval_shape(lambda h, w: jax.vjp(lambda h, w: nucleus.nucleus_entropies(h, w, BOTH), h, w)[1], h, w)
    assert sum(x.size for x in jax.tree.leaves(saved)) <= n * d + v * d + 12 * n


@pytest.mark.parametrize("mass", [0.0, 1.5])
def test_mass_is_checked(mass):
    with pytest.raises(ValueError, match=rf"mass must be in \(0, 1\], got {mass}"):
        nucleus.nucleus_entropies(jnp.zeros((2, 3)), jnp.zeros((4, 3)), (NucleusKind(mass),))


def test_number_of_chunks_is_checked():
    with pytest.raises(ValueError, match=r"num_chunks.*got 5"):
        nucleus.nucleus_entropies(jnp.zeros((2, 3)), jnp.zeros((4, 3)), BOTH, num_chunks=5)
    with pytest.raises(ValueError, match=r"num_blocks must be at least 1, got 0"):
        nucleus.nucleus_entropies(jnp.zeros((2, 3)), jnp.zeros((4, 3)), BOTH, num_blocks=0)


PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jentropy import nucleus
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
place = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
kinds = nucleus.NucleusKind(0.8), nucleus.NucleusKind(0.8, released=True)
def loss(h, w):
    a, b = nucleus.nucleus_entropies(h, w, kinds, num_chunks=4, num_blocks=4)
    return a.sum() + b.sum()
out = (NamedSharding(mesh, P("data")), NamedSharding(mesh, P("tensor")))
arguments = place((8, 4, 16), "data"), place((256, 16), "tensor")
text = jax.jit(jax.grad(loss, (0, 1)), out_shardings=out).lower(*arguments).compile().as_text()
assert "all-reduce" in text
assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute")), text
"""


def test_a_sharded_vocabulary_is_never_gathered():
    run_on_eight_devices(PROGRAM)


@jax.jit
def _random_scores(h, w, mask):
    options = {"vocab_mask": mask}
    chunked = nucleus.nucleus_entropies(h, w, BOTH, num_chunks=5, num_blocks=4, **options)
    shifted = nucleus.nucleus_entropies(h, w, BOTH, bias=jnp.full(w.shape[0], 2.0), **options)
    entropy = head.linear_scores(h, w, jnp.zeros(h.shape[0], jnp.int32), **options).entropy
    return nucleus.nucleus_entropies(h, w, BOTH, **options), chunked, shifted, entropy


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 10.0, 100.0]), st.floats(0.0, 0.95))
def test_bounds_and_invariances(seed, scale, illegal):
    rng = np.random.default_rng(seed)
    h, w = (np.float32(rng.standard_normal(shape) * scale**0.5) for shape in ((6, 4), (64, 4)))
    mask = rng.random(64) >= illegal
    mask[5] = True
    (paper, released), chunked, shifted, entropy = (np.asarray(x) for x in _random_scores(h, w, mask))
    assert (released >= 0).all() and (released <= paper + 1e-5).all() and (paper <= entropy + 1e-5).all()
    size = 1.0 + np.abs(h @ w.T).max()
    np.testing.assert_allclose(chunked, (paper, released), atol=2e-6 * size)
    np.testing.assert_allclose(shifted, (paper, released), atol=2e-6 * size)

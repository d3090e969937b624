"""Predictions of the change of entropy: their order in the step, loops over actions, illegal ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jentropy import features, head
from jentropy.theory import entropy_change

lemma1, policy_covariance = jax.jit(entropy_change.lemma1), jax.jit(entropy_change.policy_covariance)
policy_gradient_step = jax.jit(entropy_change.policy_gradient_step, static_argnames="centre")
policy_gradient_change = jax.jit(entropy_change.policy_gradient_change, static_argnames="centre")
natural_gradient_step = jax.jit(entropy_change.natural_gradient_step)
natural_gradient_change = jax.jit(entropy_change.natural_gradient_change)
entropy = jax.jit(features.entropy)

NUM_STATES, V = 20, 12
RATES = np.logspace(-5, -2, 7)


@pytest.fixture(autouse=True, scope="module")
def quick_compilations():
    """The programs are small: most of the time would go into optimising them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def draw(seed=0, *, centred=False):
    """Logits and an advantage `[20, 12]` float64; state 0 has three illegal ids, state 1 a nearly uniform policy."""
    rng = np.random.default_rng(seed)
    logits, advantage = 1.5 * rng.normal(size=(NUM_STATES, V)), 1.0 + rng.normal(size=(NUM_STATES, V))
    logits[1] *= 1e-3
    logits[0, :3] = -np.inf
    policy = softmax(logits)
    if centred:
        advantage -= (policy * advantage).sum(-1, keepdims=True)
    return jnp.asarray(logits), jnp.asarray(advantage)


def softmax(logits):
    weight = np.exp(np.asarray(logits) - np.max(logits, axis=-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def covariance_loop(logits, values):
    """Cov_{a~π}(log π(a), values(a)) of one state, action by action."""
    policy, legal = softmax(logits), np.isfinite(logits)
    mean_log = sum(p * np.log(p) for p, ok in zip(policy, legal) if ok)
    mean_value = sum(p * v for p, v, ok in zip(policy, values, legal) if ok)
    terms = zip(policy, values, legal)
    return sum(p * (np.log(p) - mean_log) * (v - mean_value) for p, v, ok in terms if ok)


def slope(errors):
    """Of log |error| in log η, `errors` `[num rates, states]`, averaged over the states."""
    return np.polyfit(np.log(RATES), np.log(np.abs(np.asarray(errors))).mean(axis=1), 1)[0]


# Whole distributions.


def changes(step):
    """The real change of entropy by a step `rate -> logits`, for every rate, `[num rates, states]`."""
    logits = step(0.0)
    return np.stack([entropy(step(rate)) - entropy(logits) for rate in RATES])


def shift(logits, direction, rate):
    return logits + rate * direction


def lemma1_change(logits, direction, rate):
    return lemma1(logits, logits + rate * direction)


printed_step = functools.partial(policy_gradient_step, centre=False)
printed_change = functools.partial(policy_gradient_change, centre=False)
PREDICTIONS = {
    "Lemma 1": (shift, lemma1_change),
    "Theorem 1": (policy_gradient_step, policy_gradient_change),
    "Theorem 1 as printed": (printed_step, printed_change),
    "Theorem 2": (natural_gradient_step, natural_gradient_change),
}


def errors(step, change, arrays, sign=1.0):
    """Of a prediction, for every rate, `[num rates, states]`."""
    predicted = np.stack([change(*arrays, rate) for rate in RATES])
    return changes(lambda rate: step(*arrays, rate)) - sign * predicted


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_error_is_of_second_order(x64, name, centred):
    step, change = PREDICTIONS[name]
    arrays = draw(centred=centred)
    found = errors(step, change, arrays)
    assert slope(found) == pytest.approx(2.0, abs=0.1)
    assert np.median(np.abs(found[0])) < 1e-3 * np.median(np.abs(changes(lambda rate: step(*arrays, rate))[0]))


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_opposite_sign_is_of_first_order(x64, name):
    # What the surveys write: Δz = -η ∇J, or -η π A.
    assert slope(errors(*PREDICTIONS[name], draw(centred=True), sign=-1.0)) == pytest.approx(1.0, abs=0.1)


def test_theorem_1_as_printed_misses_the_gradient_of_an_advantage_with_a_mean(x64):
    logits, advantage = draw()
    found = errors(policy_gradient_step, printed_change, (logits, advantage))
    assert slope(found) == pytest.approx(1.0, abs=0.1)
    mean = (softmax(logits) * np.asarray(advantage)).sum(-1)
    exact, printed = (change(logits, advantage, 0.5) for change in (policy_gradient_change, printed_change))
    gap = 0.5 * mean * np.asarray(policy_covariance(logits, jnp.asarray(softmax(logits))))
    np.testing.assert_allclose(exact - printed, gap, rtol=1e-9)


def test_the_policy_gradient_is_that_of_the_mean_advantage(x64):
    logits, advantage = draw()

    def mean_advantage(z):
        return jnp.sum(jax.nn.softmax(z) * advantage)

    gradient = jax.grad(mean_advantage)(logits)
    step = policy_gradient_step(logits, advantage, 0.25)
    finite = np.isfinite(logits)
    np.testing.assert_allclose(step[finite], (logits + 0.25 * gradient)[finite], rtol=1e-12)
    assert np.all(step[~finite] == -np.inf)


def test_a_natural_step_is_a_step_of_the_fisher_metric(x64):
    logits, advantage = draw(centred=True)
    z, a = np.asarray(logits[5]), np.asarray(advantage[5])
    policy = softmax(z)
    fisher = np.diag(policy) - np.outer(policy, policy)
    direction = np.linalg.pinv(fisher) @ (policy * a)
    step = np.asarray(natural_gradient_step(logits, advantage, 1.0))[5] - z
    np.testing.assert_allclose(step - step.mean(), direction - direction.mean(), rtol=1e-8)


def test_by_a_loop_over_actions(x64):
    logits, advantage = draw(3)
    found = policy_covariance(logits, advantage)
    natural, gradient = (f(logits, advantage, 0.5) for f in (natural_gradient_change, policy_gradient_change))
    printed = policy_gradient_change(logits, advantage, 0.5, centre=False)
    for i in range(NUM_STATES):
        z, a, policy = np.asarray(logits[i]), np.asarray(advantage[i]), softmax(logits[i])
        expected = [covariance_loop(z, values) for values in (a, policy * (a - policy @ a), policy * a)]
        np.testing.assert_allclose(found[i], expected[0], rtol=1e-9)
        np.testing.assert_allclose([natural[i], gradient[i], printed[i]], -0.5 * np.array(expected), rtol=1e-9)


def test_lemma_1_is_the_derivative_of_the_entropy(x64):
    logits, direction = draw(1)
    direction = jnp.where(logits == -jnp.inf, 0.0, direction)
    _, derivative = jax.jvp(entropy, (logits,), (direction,))
    np.testing.assert_allclose(lemma1(logits, logits + direction), derivative, rtol=1e-9, atol=1e-14)


def test_lemma_1_is_that_of_the_head():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 8), (V, 8), (3, 5, 8), (V, 8))]
    h0, w0, h1, w1 = (jnp.asarray(x) for x in arrays)
    found = lemma1(jnp.einsum("...d,vd->...v", h0, w0), jnp.einsum("...d,vd->...v", h1, w1))
    np.testing.assert_allclose(found, -head.pair_scores(h0, w0, h1, w1).covariance, rtol=2e-5, atol=1e-6)


def test_constants_in_the_logits_change_nothing(x64):
    before, after = draw(0)[0], draw(0)[0] + draw(0)[1]
    moved = lemma1(before + 100.0, after - 30.0)
    np.testing.assert_allclose(moved, lemma1(before, after), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(lemma1(before, before + 7.0), 0.0, atol=1e-13)


def test_nearly_uniform_policies_keep_their_accuracy():
    logits, advantage = draw()
    z, a = np.asarray(logits[1], np.float64), np.asarray(advantage[1], np.float64)
    found = policy_covariance(logits[1].astype(jnp.float32), advantage[1].astype(jnp.float32))
    np.testing.assert_allclose(found, covariance_loop(z, a), rtol=1e-4)


def test_illegal_ids():
    logits = jnp.array([[0.0, -jnp.inf, 1.0], [2.0, -jnp.inf, -jnp.inf], [-jnp.inf] * 3])
    advantage = jnp.array([[1.0, jnp.nan, -1.0], [5.0, jnp.inf, 1.0], [1.0, 2.0, 3.0]])
    for change in (policy_gradient_change, natural_gradient_change):
        found = change(logits, advantage, 0.5)
        wanted = change(logits[:1, ::2], advantage[:1, ::2], 0.5)
        np.testing.assert_allclose(found, [float(wanted[0]), 0.0, 0.0], rtol=1e-6)
    for step in (policy_gradient_step, natural_gradient_step):
        after = step(logits, advantage, 0.5)
        np.testing.assert_array_equal(after == -jnp.inf, logits == -jnp.inf)
        np.testing.assert_allclose(after[:1, ::2], step(logits[:1, ::2], advantage[:1, ::2], 0.5), rtol=1e-6)
        np.testing.assert_allclose(
            lemma1(logits, after)[0], lemma1(logits[:1, ::2], after[:1, ::2])[0], rtol=1e-5, atol=1e-7
        )


def test_lemma_1_has_no_value_where_the_legal_ids_change():
    before = jnp.array([[0.0, -jnp.inf, 1.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    after = jnp.array([[0.0, 0.0, 1.0], [0.0, -jnp.inf, 1.0], [0.0, 2.0, 1.5]])
    np.testing.assert_array_equal(np.isnan(lemma1(before, after)), [True, True, False])


def test_dtypes_and_rates_per_state():
    logits, advantage = (x.astype(jnp.bfloat16) for x in draw())
    rate = jnp.linspace(0.0, 1.0, NUM_STATES)
    for change, step in (
        (policy_gradient_change, policy_gradient_step),
        (natural_gradient_change, natural_gradient_step),
    ):
        found = change(logits, advantage, rate)
        assert found.dtype == jnp.float32 and step(logits, advantage, rate).dtype == jnp.bfloat16
        np.testing.assert_allclose(found, rate * change(logits, advantage, 1.0), rtol=1e-6)
        np.testing.assert_array_equal(step(logits, advantage, rate)[0], logits[0])

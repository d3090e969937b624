"""The critic: its clipped loss, one update in NumPy, learning, its place beside GAE, its state on disk."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from golden_cases import DOUBLE, TOLERANCE, close, make_normaliser, make_test

from jentropy import normalisers
from jentropy.advantages.gae import gae
from jentropy.learners.critic import critic, value_loss

NUM_TOKENS = 5
MASK = np.array([[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], bool)
TOKENS = np.random.default_rng(0).integers(0, NUM_TOKENS, MASK.shape).astype(np.int32)
RETURNS = np.random.default_rng(1).normal(size=MASK.shape).astype(np.float32)


def initial(key, params=None):
    return {"w": jax.random.normal(key, (NUM_TOKENS,))}


def value(params, tokens):
    """A number for the token before."""
    return params["w"][jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]]


def make(**options):
    return critic(**{"init": initial, "value": value, "optimizer": optax.sgd(0.5)} | options)


def rows(**token_data):
    batch = toy.rollouts(MASK, rewards=np.array([1.0, 0.0, 3.0, -1.0], np.float32), token_data=token_data)
    return batch.replace(tokens=jnp.asarray(TOKENS))


def annotated(learner, state, returns=RETURNS):
    spoiled = np.where(MASK, returns, np.nan)
    return rows(**learner.annotate(state, rows()), **{"return": spoiled})


@functools.cache
def jitted(function):
    return jax.jit(function)


loss_of = jax.jit(value_loss)


def previous():
    return np.pad(TOKENS, ((0, 0), (1, 0)))[:, :-1]


def test_loss_by_hand():
    old, returns = np.zeros((1, 6), np.float32), np.array([[1.0, 1.0, -1.0, -1.0, 1.0, np.nan]], np.float32)
    new = np.array([[0.3, 0.9, 0.9, -0.9, 3.0, np.nan]], np.float32)
    mask = np.array([[1, 1, 1, 1, 1, 0]], bool)
    loss, clipped = loss_of(new, old, returns, mask, jnp.float32(0.5))
    # 0.9 towards 1 is taken as 0.5; away from -1 it counts as it is; 3 beyond 1 is further than 0.5 is
    np.testing.assert_allclose(loss, np.array([[0.49, 0.25, 3.61, 0.25, 4.0, 0.0]]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[False, True, False, True, False, False]])
    gradient = jax.grad(lambda x: jnp.sum(loss_of(x, old, returns, mask, jnp.float32(0.5))[0]))(new)
    np.testing.assert_allclose(gradient, [[-0.7, 0.0, 1.9, 0.0, 2.0, 0.0]], rtol=1e-6)


def test_without_a_bound_it_is_half_the_square():
    loss, clipped = loss_of(7.0 * RETURNS, 0.0 * RETURNS, RETURNS, MASK, jnp.float32(np.inf))
    np.testing.assert_allclose(loss, np.where(MASK, 18.0 * RETURNS**2, 0.0), rtol=1e-5)
    assert not clipped.any()


def test_annotation():
    learner = make()
    state = learner.init(jax.random.key(0), None)
    found = learner.annotate(state, rows())["value"]
    np.testing.assert_array_equal(found, np.where(MASK, np.asarray(state.params["w"])[previous()], 0.0))
    pieces = make(num_microbatches=3).annotate(state, rows())["value"]
    np.testing.assert_array_equal(pieces, found)
    assert found.dtype == np.float32


@pytest.mark.parametrize("normaliser", [normalisers.token_mean, normalisers.sequence_mean_token_mean])
def test_one_update_in_numpy(normaliser):
    learner = make(normaliser=normaliser, cliprange_value=np.inf)
    state = learner.init(jax.random.key(0), None)
    batch = annotated(learner, state)
    new, metrics = jitted(learner.update)(state, batch, jax.random.key(1))
    w, weight = np.asarray(state.params["w"]), np.asarray(normaliser(jnp.asarray(MASK), batch))
    error = np.where(MASK, w[previous()] - RETURNS, 0.0)
    gradient = np.zeros(NUM_TOKENS)
    np.add.at(gradient, previous(), weight * error)
    np.testing.assert_allclose(new.params["w"], w - 0.5 * gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["critic/vf_loss"], (float(np.sum(weight * error**2)) / 2, 1.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["critic/vpred_mean"], (w[previous()][MASK].sum(), 6.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["critic/grad_norm"], (float(np.linalg.norm(gradient)), 1.0), rtol=1e-5)
    np.testing.assert_array_equal(metrics["critic/vf_clipfrac"], (0.0, 6.0))


def test_the_old_values_bound_the_later_ones():
    """Steps that are too large: with a bound, values stop soon after they have moved that far."""
    near, far = make(cliprange_value=0.01, num_epochs=5), make(cliprange_value=np.inf, num_epochs=5)
    state = near.init(jax.random.key(0), None)
    batch = annotated(near, state, RETURNS + 9.0)
    moved = []
    for learner in (near, far):
        new, metrics = jitted(learner.update)(learner.init(jax.random.key(0), None), batch, jax.random.key(1))
        moved.append(np.abs(np.asarray(new.params["w"]) - np.asarray(state.params["w"])).max())
        assert (metrics["critic/vf_clipfrac"][0] > 0.0) == (learner is near)
    assert moved[0] < 0.7 * moved[1]


def test_it_learns_what_gae_gives():
    """Returns at λ = 1 do not depend on the values: the critic ends at the mean return of each state."""
    learner, estimator = make(cliprange_value=np.inf, num_epochs=8), gae()
    state = learner.init(jax.random.key(0), None)

    @jax.jit
    def step(state, key):
        batch = rows(**learner.annotate(state, rows()))
        _, added, metrics, _ = estimator.estimate(batch, estimator.init())
        batch = batch.replace(token_data={**batch.token_data, **added})
        state, own = learner.update(state, batch, key)
        return state, {**metrics, **own}

    explained = []
    for i in range(40):
        state, metrics = step(state, jax.random.key(i))
        explained.append(float(metrics["critic/vf_explained_var"][0]))
    returns = np.broadcast_to(np.array([1.0, 0.0, 3.0, -1.0])[:, None], MASK.shape)[MASK]
    seen = previous()[MASK]
    best = np.array([returns[seen == s].mean() for s in seen])
    assert explained[-1] > explained[0]
    np.testing.assert_allclose(explained[-1], 1.0 - np.var(returns - best) / np.var(returns), atol=0.05)


def test_micro_batches_change_nothing():
    state = make().init(jax.random.key(0), None)
    batch = annotated(make(), state)
    found, wanted = (
        jitted(make(num_minibatches=2, num_microbatches=num).update)(state, batch, jax.random.key(1)) for num in (2, 1)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, wanted)


def test_a_restored_state_goes_on_bit_for_bit():
    learner = make(optimizer=optax.adam(0.1), num_epochs=2)
    update = jitted(learner.update)
    state = learner.init(jax.random.key(0), None)
    batch = annotated(learner, state)
    state, _ = update(state, batch, jax.random.key(1))
    leaves, structure = jax.tree.flatten(state)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    stored = np.load(file)
    restored = jax.tree.unflatten(structure, [jnp.asarray(stored[name]) for name in stored.files])
    one, two = (update(s, batch, jax.random.key(2))[0] for s in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert jax.tree.structure(one) == structure == jax.tree.structure(learner.init(jax.random.key(0), None))
    for before, after in zip(leaves, jax.tree.leaves(one)):
        assert (before.shape, before.dtype, before.weak_type) == (after.shape, after.dtype, after.weak_type)


def test_settings_share_a_compilation():
    optimizer = optax.sgd(0.5)
    one, two = make(optimizer=optimizer), make(optimizer=optimizer, cliprange_value=0.2)
    assert one.update == two.update and hash(one.update) == hash(two.update) and one.annotate == two.annotate
    assert one.update != make(optimizer=optimizer, num_epochs=2).update


def test_missing_data_and_refusals():
    learner = make()
    state = learner.init(jax.random.key(0), None)
    with pytest.raises(ValueError, match=r"the critic needs token_data\['return'\], got \['value'\]"):
        learner.update(state, rows(**learner.annotate(state, rows())), jax.random.key(0))
    with pytest.raises(ValueError, match=r"cliprange_value must be above 0, got 0\.0"):
        make(cliprange_value=0.0)
    with pytest.raises(ValueError, match="num_minibatches must be a whole number of at least 1, got 0"):
        make(num_minibatches=0)


def check_value_loss(golden, precision):
    """`base_vloss_*`: verl's value loss and its gradient; the share of clipped tokens has `N + 1e-8`."""
    mask, tolerance = golden["response_mask"] > 0, TOLERANCE[precision]
    bound = jnp.asarray(float(golden["cliprange_value"]))
    old, returns = (np.where(mask, golden[k], np.nan) for k in ("values", "returns"))
    batch = toy.rollouts(mask, logp_old=np.zeros(mask.shape))
    for key in (k for k in golden if k.startswith("loss__")):
        mode = key.removeprefix("loss__")
        weight = make_normaliser(mode, mask.shape[1])(jnp.asarray(mask), batch)

        def loss(new, weight=weight):
            token_loss, clipped = loss_of(new, old, returns, mask, bound)
            return jnp.sum(weight * token_loss), clipped

        (total, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(golden["vpreds"]))
        close(total, golden[key], tolerance)
        close(gradient, golden[f"grad__{mode}"], tolerance)
        close(np.asarray(clipped).sum() / (mask.sum() + 1e-8), golden["clipfrac"], tolerance)


FAMILIES = {"base_vloss_*": (check_value_loss, DOUBLE)}

test_released_code = make_test(FAMILIES)

"""Mini-batches of rows, sums over micro-batches, and which updates are made."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from jentropy import fitting

ROWS = 7
MASK = np.ones((ROWS, 2), bool)
MASK[[2, 5]] = False
X = np.arange(1.0, 8.0, dtype=np.float32)
Y = np.array([1.0, -1.0, 9.0, 0.5, 2.0, 9.0, 0.0], np.float32)


def rows(mask=MASK, **row_data):
    data = {"x": X, "y": Y} | row_data
    return toy.rollouts(mask, row_id=np.array([4, 9, 0, 3, 8, 2, 6]), row_data=data)


def loss(params, rows, weight):
    """½ (x·w - y)² on rows with tokens."""
    used = jnp.any(rows.loss_mask, axis=1)
    error = jnp.where(used, params["w"] * rows.row_data["x"] - rows.row_data["y"], 0.0)
    return jnp.sum(weight * jnp.square(error)) / 2, {"error": (jnp.sum(error), jnp.sum(used, dtype=error.dtype))}


def weigh(rows):
    used = jnp.any(rows.loss_mask, axis=1).astype(jnp.float32)
    return used / jnp.maximum(jnp.sum(used), 1.0)


@functools.partial(jax.jit, static_argnames=("optimizer", "passes", "loss"))
def fit(rollouts, key, *, optimizer, passes, loss=loss):
    params = {"w": jnp.float32(0.25)}
    return fitting.fit(loss, weigh, optimizer, passes, fitting.Fitted(params, optimizer.init(params)), rollouts, key)


SGD, ADAM = optax.sgd(0.01), optax.adam(0.1)
deal = jax.jit(fitting.minibatches, static_argnames=("num", "multiple"))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]))
def test_every_used_row_is_dealt_once(seed, num, multiple):
    rng = np.random.default_rng(seed)
    row_id, used = rng.permutation(20)[:ROWS].astype(np.int32), rng.random(ROWS) < 0.7
    key = jax.random.key(seed)
    index = np.asarray(deal(key, row_id, used, num=num, multiple=multiple))
    assert index.shape[0] == num and index.shape[1] % multiple == 0
    present = index[index < ROWS]
    assert sorted(present) == list(np.flatnonzero(used))
    sizes = (index < ROWS).sum(axis=1)
    assert np.ptp(sizes) <= 1 and (np.sort(sizes)[::-1] == sizes).all()
    order = rng.permutation(ROWS)
    permuted = np.asarray(deal(key, row_id[order], used[order], num=num, multiple=multiple))
    named, again = (np.append(i, -1)[j] for i, j in ((row_id, index), (row_id[order], permuted)))
    np.testing.assert_array_equal(named, again)


def test_rows_that_are_not_used_change_no_deal():
    row_id = np.arange(12, dtype=np.int32)
    key, used = jax.random.key(3), row_id < 8
    short = np.asarray(deal(key, row_id[:8], used[:8], num=3, multiple=1))
    long = np.asarray(deal(key, row_id, used, num=3, multiple=1))
    for one, two in zip(short, long):
        np.testing.assert_array_equal(one[one < 8], two[two < 12])
    other = np.asarray(deal(jax.random.key(4), row_id, used, num=3, multiple=1))
    assert np.any(other != long)


@pytest.mark.parametrize("num", [2, 3, 8])
def test_in_pieces_is_the_whole(num):
    x = jnp.arange(14.0).reshape(7, 2)
    np.testing.assert_array_equal(fitting.in_pieces(lambda y: y * 2.0, x, num), x * 2.0)
    sums = fitting.in_pieces(lambda y: jnp.sum(y, axis=1), x, num)
    np.testing.assert_array_equal(sums, fitting.in_pieces(lambda y: jnp.sum(y, axis=1), x, 1))


def test_one_update_by_hand():
    fitted, metrics = fit(rows(), jax.random.key(0), optimizer=SGD, passes=fitting.Passes())
    used = MASK.any(axis=1)
    error = (0.25 * X - Y)[used]
    gradient = np.mean(error * X[used])
    np.testing.assert_allclose(fitted.params["w"], 0.25 - 0.01 * gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (float(np.mean(error**2)) / 2, 1.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], (abs(float(gradient)), 1.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["error"], (error.sum(), 5.0), rtol=1e-6)
    np.testing.assert_array_equal(metrics["skipped"], (0.0, 1.0))


@pytest.mark.parametrize("num_micro", [2, 3, 8])
def test_micro_batches_change_nothing(num_micro):
    for num_minibatches in (1, 2):
        found, wanted = (
            fit(rows(), jax.random.key(1), optimizer=ADAM, passes=fitting.Passes(2, num_minibatches, num))
            for num in (num_micro, 1)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, wanted)


def test_order_and_padding_of_rows_change_nothing():
    passes = fitting.Passes(2, 3)
    wanted = fit(rows(), jax.random.key(1), optimizer=ADAM, passes=passes)
    order = np.random.default_rng(0).permutation(ROWS)
    found = fit(jax.tree.map(lambda x: x[order], rows()), jax.random.key(1), optimizer=ADAM, passes=passes)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:2]]), rows())
    padded = padded.replace(
        row_id=padded.row_id.at[ROWS:].set(jnp.array([50, 51], jnp.int32)),
        row_data={**padded.row_data, "is_valid": jnp.arange(ROWS + 2) < ROWS},
    )
    found = fit(padded, jax.random.key(1), optimizer=ADAM, passes=passes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, wanted)


def test_mini_batches_are_one_after_the_other():
    """Two rows, two updates, in the order of the deal: plain gradient descent on one row at a time."""
    mask = np.zeros_like(MASK)
    mask[[1, 3]] = True
    key = jax.random.key(5)
    fitted, metrics = fit(rows(mask), key, optimizer=SGD, passes=fitting.Passes(1, 2))
    (epoch_key,) = jax.random.split(key, 1)
    w = 0.25
    for row in np.asarray(deal(epoch_key, rows().row_id, mask.any(axis=1), num=2, multiple=1))[:, 0]:
        w -= 0.01 * (w * X[row] - Y[row]) * X[row]
    np.testing.assert_allclose(fitted.params["w"], w, rtol=1e-6)
    assert metrics["loss"][1] == 2.0


def test_an_update_without_rows_moves_nothing():
    """Adam's moments would still move the parameters."""
    mask = np.zeros_like(MASK)
    mask[1] = True
    one, _ = fit(rows(mask), jax.random.key(2), optimizer=ADAM, passes=fitting.Passes(1, 1))
    three, metrics = fit(rows(mask), jax.random.key(2), optimizer=ADAM, passes=fitting.Passes(1, 3))
    jax.tree.map(np.testing.assert_array_equal, one, three)
    np.testing.assert_array_equal(metrics["skipped"], (0.0, 1.0))
    none, metrics = fit(rows(np.zeros_like(MASK)), jax.random.key(2), optimizer=ADAM, passes=fitting.Passes())
    assert none.params["w"] == 0.25 and metrics["loss"] == (0.0, 0.0) and metrics["skipped"] == (0.0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_moves_nothing_and_is_counted(bad):
    spoiled = rows(x=np.where(np.arange(ROWS) == 1, np.float32(bad), X))
    fitted, metrics = fit(spoiled, jax.random.key(2), optimizer=ADAM, passes=fitting.Passes())
    assert fitted.params["w"] == 0.25 and int(fitted.opt_state[0].count) == 0
    np.testing.assert_array_equal(metrics["skipped"], (1.0, 1.0))
    np.testing.assert_array_equal(metrics["loss"], (0.0, 0.0))
    spoiled = rows(x=np.where(np.arange(ROWS) == 2, np.float32(bad), X))  # a row without tokens
    fitted, metrics = fit(spoiled, jax.random.key(2), optimizer=ADAM, passes=fitting.Passes())
    assert fitted.params["w"] != 0.25 and metrics["skipped"][0] == 0.0


def test_missing_data():
    with pytest.raises(ValueError, match=r"the critic needs token_data\['value'\], got \['a', 'b'\]"):
        fitting.needed({"b": jnp.asarray(X), "a": jnp.asarray(X)}, "value", "the critic")


@pytest.mark.parametrize("name", ["num_epochs", "num_minibatches", "num_microbatches"])
@pytest.mark.parametrize("value", [0, 1.5])
def test_refusals(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
        fitting.Passes(**{name: value})

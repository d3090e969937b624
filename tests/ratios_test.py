"""Log-ratios: selection before arithmetic, gradients at the bounds, k3 in its tail."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jentropy import ratios


def test_clip_has_the_whole_gradient_at_its_bounds_and_none_outside():
    x = jnp.array([-2.0, -1.0, 0.5, 1.0, 1.5])
    np.testing.assert_array_equal(ratios.clip(x, -1.0, 1.0), [-1.0, -1.0, 0.5, 1.0, 1.0])
    gradient = jax.grad(lambda y: jnp.sum(ratios.clip(y, -1.0, 1.0)))(x)
    np.testing.assert_array_equal(gradient, [0.0, 1.0, 1.0, 1.0, 0.0])


def test_infinite_bounds_do_not_clip():
    x = jnp.array([0.0, 3.0])
    np.testing.assert_array_equal(ratios.clip(x, jnp.zeros(2), jnp.full(2, jnp.inf)), x)


def test_log_ratio_ignores_what_is_outside_the_mask():
    mask = jnp.array([[True, False, False]])
    x, y = jnp.array([[-1.0, jnp.nan, -jnp.inf]]), jnp.array([[-3.0, jnp.inf, -jnp.inf]])
    np.testing.assert_array_equal(ratios.log_ratio(x, y, mask), [[2.0, 0.0, 0.0]])
    gradient = jax.grad(lambda z: jnp.sum(ratios.log_ratio(z, y, mask)))(x)
    np.testing.assert_array_equal(gradient, [[1.0, 0.0, 0.0]])


def test_k3_is_small_and_exact_near_zero_and_never_negative():
    x = np.array([0.0, 1e-4, -1e-4, 0.5, -3.0], np.float32)
    exact = [math.expm1(v) - v for v in x.astype(np.float64)]
    ours = ratios.k3(jnp.asarray(x))
    np.testing.assert_allclose(ours, exact, rtol=2e-6, atol=2e-11)
    assert ours[0] == 0.0 and np.all(ours >= 0.0)


def test_k3_keeps_its_slope_where_the_exponential_would_overflow():
    gradient = jax.vmap(jax.grad(ratios.k3))(jnp.array([-1000.0, 0.0, 0.5, 19.0, 21.0, 1000.0]))
    slopes = [-1.0, 0.0, math.expm1(0.5), math.expm1(19.0), math.expm1(20.0), math.expm1(20.0)]
    np.testing.assert_allclose(gradient, slopes, rtol=2e-6)
    assert np.isfinite(ratios.k3(jnp.float32(1000.0)))

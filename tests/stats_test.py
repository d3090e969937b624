"""Tests of `jentropy.stats` against NumPy loops."""

import functools
import itertools
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy import stats

B, T = 6, 7
VALUES = (-np.inf, -2.5, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.1, 0.1, 3.0, np.inf)

masked_sum = jax.jit(stats.masked_sum, static_argnums=2)
masked_mean = jax.jit(stats.masked_mean, static_argnums=2)
masked_variance = jax.jit(stats.masked_variance, static_argnames="ddof")
masked_covariance = jax.jit(stats.masked_covariance, static_argnames="ddof")
cross_deviation = jax.jit(stats.cross_deviation)
is_constant = jax.jit(stats.is_constant)
order_statistic = jax.jit(stats.order_statistic)
quantile = jax.jit(stats.quantile)
top_k_mask = jax.jit(stats.top_k_mask)
row_top_k_mask = jax.jit(stats.row_top_k_mask)
random_mask = jax.jit(stats.random_mask)
row_uniform = jax.jit(stats.row_uniform, static_argnums=2)
fraction_of = jax.jit(stats.fraction_of)
fraction_divmod = jax.jit(stats.fraction_divmod)
group_count = jax.jit(stats.group_count)
group_sum = jax.jit(stats.group_sum)
group_mean = jax.jit(stats.group_mean)
group_std = jax.jit(stats.group_std, static_argnames="ddof")
group_is_constant = jax.jit(stats.group_is_constant)
group_order_statistic = jax.jit(stats.group_order_statistic)

property_test = functools.partial(settings, derandomize=True, deadline=None)


@st.composite
def batches(draw, values=VALUES):
    """`(x, mask, row_id)` with many ties, masked NaN, and masks from empty to full."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.03, 0.5, 0.9, 1.0]))
    num_values = draw(st.integers(1, len(values)))
    mask = rng.random((B, T)) < density
    x = rng.choice(rng.permutation(values)[:num_values], (B, T))
    row_id = rng.choice(np.array([0, 1, 2, 3, 5, 8, 100, 65536, 2**31 - 1]), B, replace=False)
    return np.where(mask, x, np.nan).astype(np.float32), mask, row_id.astype(np.int32)


def top_k_loop(x, mask, k, row_id):
    """The k largest by an explicit sort of (-value, row_id, column)."""
    entries = [(-x[b, t] + 0.0, row_id[b], t, b) for b in range(x.shape[0]) for t in range(x.shape[1]) if mask[b, t]]
    selected = np.zeros(x.shape, bool)
    for _, _, t, b in sorted(entries)[: max(k, 0)]:
        selected[b, t] = True
    return selected


class MomentsTest(parameterized.TestCase):
    @parameterized.parameters(0, 1)
    def test_against_numpy(self, ddof):
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(2, B, T))
        mask = rng.random((B, T)) < 0.6
        dx, dy = x - x[mask].mean(), y - y[mask].mean()
        with jax.enable_x64(True):
            jx, jy, jm = (
                jnp.asarray(np.where(mask, x, np.nan)),
                jnp.asarray(np.where(mask, y, np.inf)),
                jnp.asarray(mask),
            )
            close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
            close(masked_sum(jx, jm), x[mask].sum())
            close(masked_mean(jx, jm), x[mask].mean())
            close(masked_mean(jx, jm, 1), [x[b][mask[b]].mean() for b in range(B)])
            close(masked_sum(jx, jm, 0), [x[:, t][mask[:, t]].sum() for t in range(T)])
            close(masked_variance(jx, jm, ddof=ddof), x[mask].var(ddof=ddof))
            close(masked_covariance(jx, jy, jm, ddof=ddof), np.cov(x[mask], y[mask], ddof=ddof)[0, 1])
            close(cross_deviation(jx, jy, jm), np.where(mask, dx * dy, 0.0))

    def test_variance_is_two_pass(self):
        x = jnp.asarray([[1e4, 1e4 + 1, 1e4 + 2]], jnp.float32)
        np.testing.assert_allclose(masked_variance(x, x > 0), 2 / 3, rtol=1e-6)  # E[x²] - E[x]² gives 0 or 8

    def test_empty_mask_is_zero(self):
        x = jnp.full((B, T), jnp.nan)
        mask = jnp.zeros((B, T), bool)
        for ddof in (0, 1):
            self.assertEqual(masked_variance(x, mask, ddof=ddof), 0.0)
            self.assertEqual(masked_covariance(x, x, mask, ddof=ddof), 0.0)
        self.assertEqual(masked_sum(x, mask), 0.0)
        np.testing.assert_array_equal(masked_mean(x, mask, 1), np.zeros(B))
        np.testing.assert_array_equal(cross_deviation(x, x, mask), np.zeros((B, T)))
        self.assertTrue(is_constant(x, mask))

    def test_one_entry(self):
        x = jnp.full((B, T), jnp.nan).at[2, 3].set(0.1)
        mask = jnp.zeros((B, T), bool).at[2, 3].set(True)
        self.assertEqual(masked_mean(x, mask), np.float32(0.1))
        self.assertEqual(masked_variance(x, mask, ddof=1), 0.0)
        self.assertTrue(is_constant(x, mask))

    def test_gradient_ignores_masked_nan(self):
        x = jnp.asarray([[1.0, jnp.nan, 3.0, jnp.inf]])
        mask = jnp.asarray([[True, False, True, False]])
        np.testing.assert_allclose(jax.grad(masked_variance)(x, mask), [[-1.0, 0.0, 1.0, 0.0]])
        np.testing.assert_allclose(jax.grad(masked_covariance)(x, x, mask), [[-0.5, 0.0, 0.5, 0.0]])

    @parameterized.parameters(([0.1, 0.1, 0.1], True), ([0.0, -0.0, 0.0], True), ([0.1, 0.1, 0.1000001], False))
    def test_is_constant(self, values, expected):
        x = jnp.asarray([*values, jnp.nan], jnp.float32)
        self.assertEqual(is_constant(x, jnp.arange(4) < 3), expected)
        self.assertTrue(is_constant(jnp.full(4, jnp.inf), jnp.arange(4) < 3))

    def test_whitening_by_hand(self):
        mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1]], bool)
        x = np.where(mask, [[1.0], [4.0], [0.0], [0.0]], np.nan).astype(np.float32)
        token = (np.array([1.0, 4.0, 0.0]) - 1.4) / np.sqrt((3 * 0.4**2 + 2.6**2 + 1.4**2) / 4)
        row = (np.array([1.0, 4.0, 0.0]) - 5 / 3) / np.std([1.0, 4.0, 0.0], ddof=1)
        for whiten, rows in ((stats.whiten, token), (stats.whiten_rows, row)):
            wanted = np.where(mask, np.array([rows[0], rows[1], 0.0, rows[2]])[:, None], 0.0)
            np.testing.assert_allclose(jax.jit(whiten)(x, mask), wanted, rtol=1e-6)

    def test_whitening_of_values_that_differ_within_rows(self):
        x = np.array([[1.0, 2.0], [6.0, 0.0]], np.float32)
        mask = np.array([[True, True], [True, False]])
        mean = (1.5 + 6.0) / 2
        std = np.sqrt(((1 - mean) ** 2 + (2 - mean) ** 2) / 2 + (6 - mean) ** 2)
        np.testing.assert_allclose(stats.whiten_rows(x, mask), np.where(mask, (x - mean) / std, 0.0), rtol=1e-6)

    @parameterized.parameters(stats.whiten, stats.whiten_rows)
    def test_whitening_of_nothing_to_compare(self, whiten):
        whiten, mask = jax.jit(whiten), np.arange(B * T).reshape(B, T) % 3 > 0
        self.assertFalse(np.any(whiten(np.full((B, T), 1e6 + 0.1, np.float32), mask)))  # rounding would be whitened
        for few in (np.zeros((B, T), bool), mask & (np.arange(B * T).reshape(B, T) == 4)):
            self.assertFalse(np.any(whiten(np.full((B, T), 3.0, np.float32), few)))

    def test_one_row_is_not_whitened_by_rows(self):
        x = np.arange(B * T, dtype=np.float32).reshape(B, T)
        mask = np.broadcast_to(np.arange(B)[:, None] == 1, (B, T))
        self.assertFalse(np.any(stats.whiten_rows(x, mask)))
        self.assertTrue(np.any(stats.whiten(x, mask)))

    @parameterized.parameters(0.0, 0.5, 1.0)
    def test_reward_to_go(self, gamma):
        rng = np.random.default_rng(0)
        mask = rng.random((B, T)) < 0.6
        mask[0] = False
        reward = np.where(mask, rng.normal(size=(B, T)), np.nan).astype(np.float32)
        wanted = np.zeros((B, T))
        for b in range(B):
            later = 0.0
            for t in reversed(np.flatnonzero(mask[b])):
                wanted[b, t] = later = reward[b, t] + gamma * later
        found = jax.jit(stats.reward_to_go)(reward, mask, jnp.float32(gamma))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)

    def test_rejects_masks_of_other_shape_or_type(self):
        with pytest.raises(AssertionError):
            stats.masked_mean(jnp.ones((2, 3)), jnp.ones((2, 1), bool))
        with pytest.raises(AssertionError):
            stats.masked_mean(jnp.ones((2, 3)), jnp.ones((2, 3)))


class OrderStatisticTest(parameterized.TestCase):
    @parameterized.parameters("float16", "bfloat16", "float32", "float64")
    def test_keys_keep_the_order(self, dtype):
        with jax.enable_x64(True):
            info = jnp.finfo(dtype)
            ends = [float(v) for v in (info.smallest_subnormal, info.tiny, info.eps, 1.0, info.max)]
            x = jnp.asarray([-np.inf, *[-v for v in reversed(ends)], 0.0, *ends, np.inf], dtype)
            keys = np.asarray(stats.order_keys(x)).astype(object)
            self.assertTrue(all(a < b for a, b in itertools.pairwise(keys)))
            self.assertEqual(*stats.order_keys(jnp.asarray([-0.0, 0.0], dtype)))
            mask = jnp.ones(x.shape, bool)
            statistics = jax.vmap(stats.order_statistic, (None, None, 0))(x, mask, jnp.arange(x.size, dtype=jnp.int32))
            self.assertEqual(statistics.dtype, x.dtype)
            np.testing.assert_array_equal(stats.order_keys(statistics), stats.order_keys(x))

    @property_test(max_examples=60)
    @given(batches(), st.integers(-3, B * T + 3))
    def test_order_statistic(self, batch, rank):
        x, mask, _ = batch
        values = np.sort(x[mask])
        expected = values[np.clip(rank, 0, values.size - 1)] if values.size else 0.0
        self.assertEqual(order_statistic(x, mask, jnp.int32(rank)), expected)

    @property_test(max_examples=60)
    @given(
        batches(values=(-2.0, -1.0, -0.0, 0.0, 0.1, 0.3, 5.0)), st.sampled_from([0, 0.1, 0.2, 1 / 3, 0.5, 0.8, 0.9, 1])
    )
    def test_quantile(self, batch, q):
        x, mask, _ = batch
        expected = np.quantile(x[mask].astype(np.float64), q) if mask.any() else 0.0
        np.testing.assert_allclose(quantile(x, mask, jnp.float32(q)), expected, rtol=2e-6, atol=2e-6)
        with jax.enable_x64(True):
            x64 = jnp.asarray(x, jnp.float64)
            expected = np.quantile(np.asarray(x64)[mask], q) if mask.any() else 0.0
            np.testing.assert_allclose(quantile(x64, mask, jnp.float64(q)), expected, rtol=1e-12, atol=1e-12)

    @parameterized.parameters("float32", "float64")
    def test_quantile_at_a_whole_position_is_an_entry(self, dtype):
        # In float32, 0.8 · 10 is 8.00000012 with a fused multiply and subtract.
        with jax.enable_x64(True):
            x = jnp.sqrt(jnp.arange(10001, dtype=dtype))[::-1]
            for n in (11, 1001, 10001):
                for tenths in range(11):
                    q = jnp.asarray(tenths / 10, dtype)
                    self.assertEqual(quantile(x, x < x[::-1][n - 1] + 0.001, q), x[::-1][(n - 1) * tenths // 10])

    def test_quantile_next_to_infinity(self):
        x = jnp.asarray([-jnp.inf, -jnp.inf, 1.0, 3.0, jnp.inf, jnp.inf, jnp.nan])
        mask = jnp.arange(7) < 6
        for q, expected in ((0.1, -np.inf), (0.3, -np.inf), (0.5, 2.0), (0.7, np.inf), (0.9, np.inf), (1.0, np.inf)):
            self.assertEqual(quantile(x, mask, jnp.float32(q)), expected)

    def test_per_row(self):
        x = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)
        per_row = jax.jit(jax.vmap(stats.quantile, (0, 0, None)))(x, x < 2, jnp.float32(0.3))
        np.testing.assert_allclose(per_row, [np.quantile(row[row < 2], 0.3) for row in x], rtol=2e-6)


class TopKTest(parameterized.TestCase):
    @property_test(max_examples=120)
    @given(batches(), st.integers(-2, B * T + 2))
    def test_against_sort(self, batch, k):
        x, mask, row_id = batch
        selected = np.asarray(top_k_mask(x, mask, jnp.int32(k), row_id))
        np.testing.assert_array_equal(selected, top_k_loop(x, mask, k, row_id))
        self.assertEqual(selected.sum(), np.clip(k, 0, mask.sum()))

    @property_test(max_examples=20)
    @given(batches(), st.integers(0, B * T), st.permutations(range(B)))
    def test_permutation_and_padding_change_nothing(self, batch, k, order):
        x, mask, row_id = batch
        order, k = np.array(order), jnp.int32(k)
        selected = np.asarray(top_k_mask(x, mask, k, row_id))
        np.testing.assert_array_equal(top_k_mask(x[order], mask[order], k, row_id[order]), selected[order])
        pad = ((0, 2), (0, 3))
        padded_id = np.concatenate([row_id, np.array([4, 7], np.int32)])
        padded = top_k_mask(np.pad(x, pad, constant_values=np.inf), np.pad(mask, pad), k, padded_id)
        np.testing.assert_array_equal(padded, np.pad(selected, pad))

    @property_test(max_examples=20)
    @given(batches(), st.integers(0, B * T))
    def test_precision_and_masked_values_change_nothing(self, batch, k):
        x, mask, row_id = batch
        selected = np.asarray(top_k_mask(x, mask, jnp.int32(k), row_id))
        np.testing.assert_array_equal(top_k_mask(np.where(mask, x, np.inf), mask, jnp.int32(k), row_id), selected)
        with jax.enable_x64(True):
            wide = top_k_mask(jnp.asarray(x, jnp.float64), mask, jnp.int32(k), row_id)
        np.testing.assert_array_equal(wide, selected)

    def test_jit_equals_eager(self):
        x = jnp.asarray([[0.5, 0.5, -0.0], [0.0, 0.5, 0.5]])
        mask = jnp.asarray([[True, True, True], [True, True, False]])
        row_id = jnp.asarray([9, 4], jnp.int32)
        eager = stats.top_k_mask(x, mask, jnp.int32(4), row_id)
        np.testing.assert_array_equal(eager, np.array([[1, 1, 0], [1, 1, 0]], bool))
        np.testing.assert_array_equal(top_k_mask(x, mask, jnp.int32(4), row_id), eager)

    def test_all_equal_goes_by_row_id_then_column(self):
        selected = top_k_mask(
            jnp.full((3, 4), 0.1), jnp.ones((3, 4), bool), jnp.int32(6), jnp.asarray([7, 2**31 - 1, 0])
        )
        np.testing.assert_array_equal(selected, np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool))

    @property_test(max_examples=40)
    @given(batches(), st.integers(-2, T + 2))
    def test_per_row_is_the_selection_of_each_row(self, batch, k):
        x, mask, row_id = batch
        k = np.array([k, 0, 1, 2, T, T + 5], np.int32)
        expected = [top_k_loop(x[b : b + 1], mask[b : b + 1], k[b], row_id[b : b + 1])[0] for b in range(B)]
        np.testing.assert_array_equal(row_top_k_mask(x, mask, k), expected)
        pad = ((0, 1), (0, 3))
        padded = row_top_k_mask(np.pad(x, pad, constant_values=np.inf), np.pad(mask, pad), np.append(k, np.int32(4)))
        np.testing.assert_array_equal(padded, np.pad(expected, pad))

    @parameterized.parameters(128, 161)
    def test_rows_longer_than_a_block(self, columns):
        # Counts of one block are int8: 128 entries of one row would be -128.
        x = (jnp.arange(2 * columns, dtype=jnp.float32) * 7919 % 601).reshape(2, columns)
        mask = jnp.ones_like(x, bool)
        row_id, k = jnp.asarray([1, 0], jnp.int32), jnp.int32(columns + 3)
        expected = top_k_loop(np.asarray(x), np.asarray(mask), int(k), np.asarray(row_id))
        np.testing.assert_array_equal(top_k_mask(x, mask, k, row_id), expected)
        per_row = row_top_k_mask(x, mask, jnp.asarray([columns - 1, 128], jnp.int32))
        np.testing.assert_array_equal(jnp.sum(per_row, axis=1), [columns - 1, min(columns, 128)])
        for rank in (0, 127, 2 * columns - 1):
            self.assertEqual(order_statistic(x, mask, jnp.int32(rank)), np.sort(np.ravel(x))[rank])
        self.assertEqual(masked_mean(x, mask), np.mean(np.asarray(x)))
        self.assertEqual(masked_mean(jnp.ones(()), jnp.ones((), bool)), 1.0)

    @parameterized.parameters(stats.top_k_mask, stats.row_top_k_mask)
    def test_program_has_no_sort_and_no_gather(self, function):
        rows = jnp.arange(B, dtype=jnp.int32)
        k = (rows,) if function is stats.row_top_k_mask else (jnp.int32(3), rows)
        text = jax.jit(function).lower(jnp.ones((B, T)), jnp.ones((B, T), bool), *k).as_text()
        for operation in ("stablehlo.sort", "gather", "chlo.top_k", "scatter"):
            self.assertNotIn(operation, text)

    @parameterized.parameters((0, 5), (3, 0))
    def test_no_entries_at_all(self, rows, columns):
        x = jnp.zeros((rows, columns))
        chex.assert_shape(top_k_mask(x, x > 0, jnp.int32(2), jnp.arange(rows, dtype=jnp.int32)), (rows, columns))


class RandomMaskTest(parameterized.TestCase):
    @property_test(max_examples=30)
    @given(batches(), st.integers(-2, B * T + 2), st.integers(0, 1000))
    def test_count_is_exact(self, batch, k, seed):
        _, candidates, row_id = batch
        selected = np.asarray(random_mask(jax.random.key(seed), row_id, candidates, jnp.int32(k)))
        self.assertEqual(selected.sum(), np.clip(k, 0, candidates.sum()))
        self.assertFalse((selected & ~candidates).any())

    def test_permutation_padding_and_precision_change_nothing(self):
        rng = np.random.default_rng(2)
        key, k = jax.random.key(5), jnp.int32(9)
        candidates, row_id, order = rng.random((B, T)) < 0.7, np.arange(3, 3 + B, dtype=np.int32), rng.permutation(B)
        selected = np.asarray(random_mask(key, row_id, candidates, k))
        np.testing.assert_array_equal(random_mask(key, row_id[order], candidates[order], k), selected[order])
        padded_id = np.concatenate([row_id, np.array([0, 1], np.int32)])
        padded = random_mask(key, padded_id, np.pad(candidates, ((0, 2), (0, 5))), k)
        np.testing.assert_array_equal(padded, np.pad(selected, ((0, 2), (0, 5))))
        with jax.enable_x64(True):
            np.testing.assert_array_equal(random_mask(key, row_id, candidates, k), selected)

    def test_is_roughly_uniform(self):
        candidates = np.arange(B * T).reshape(B, T) % 3 != 0
        row_id = np.arange(B, dtype=np.int32)
        total = sum(
            np.asarray(random_mask(jax.random.key(seed), row_id, candidates, jnp.int32(7)), int) for seed in range(400)
        )
        frequency = total[candidates] / 400  # 28 candidates
        np.testing.assert_allclose(frequency, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 400))

    def test_row_uniform(self):
        key = jax.random.key(3)
        draws = np.asarray(row_uniform(key, jnp.asarray([4, 2], jnp.int32), 5))
        wide = np.asarray(row_uniform(key, jnp.asarray([2, 3, 4], jnp.int32), 9))
        np.testing.assert_array_equal(draws, wide[[2, 0], :5])
        self.assertTrue(((wide >= 0) & (wide < 1)).all())
        self.assertLen(np.unique(wide), wide.size)


class FractionTest(parameterized.TestCase):
    @parameterized.parameters(0.0, 1.0, 0.2, 0.03, 2e-4, 0.29, 0.57, 1 / 3, 0.1234, 0.9999, 1e-5, 1.5e-5, 1e-8)
    def test_of_counts(self, fraction):
        exact = Fraction(1, 3) if fraction == 1 / 3 else Fraction(str(fraction))
        rng = np.random.default_rng(0)
        small, large = np.arange(3000), rng.integers(0, 4_000_001, 3000)
        multiples = 10_000 * np.arange(401)
        counts = np.concatenate([small, large, multiples, multiples + 9_999, [4_000_000, 2**31 - 1]])
        expected = [(int(n) * exact).__floor__() for n in counts]
        parts = stats.fraction_parts(fraction)
        actual = fraction_of(jnp.asarray(counts, jnp.int32), parts)
        np.testing.assert_array_equal(actual, expected)
        self.assertEqual(actual.dtype, jnp.int32)
        floor, rest = fraction_divmod(jnp.asarray(counts, jnp.int32), parts)
        np.testing.assert_array_equal(floor, expected)
        held = Fraction(int(parts.numerator), int(parts.denominator))
        remainders = [(int(n) * held % 1) * held.denominator for n in counts]
        np.testing.assert_array_equal(rest, np.asarray(remainders, np.int64))
        self.assertEqual(rest.dtype, jnp.int32)

    @property_test(max_examples=30)
    @given(st.floats(0, 1))
    def test_any_fraction_stays_in_range(self, fraction):
        parts = stats.fraction_parts(fraction)
        self.assertLess(int(parts.numerator) * (int(parts.denominator) - 1), 2**31)
        counts = np.array([0, 1, 10**6, 2**31 - 1], np.int32)
        actual = np.asarray(fraction_of(jnp.asarray(counts), parts)).astype(np.float64)
        np.testing.assert_allclose(actual, fraction * counts.astype(np.float64), rtol=1e-5, atol=1)
        self.assertTrue((actual <= counts).all())

    @parameterized.parameters(-0.1, 1.1, float("nan"))
    def test_rejects(self, fraction):
        with pytest.raises(ValueError, match="fraction must be in"):
            stats.fraction_parts(fraction)


class GroupTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(4)
        order = rng.permutation(12)
        # Groups of 5, 3, 2 and 1 rows and a group without a valid row; some rows invalid.
        self.group = np.array([0, 0, 0, 0, 0, 7, 7, 7, 1, 1, 3, 11], np.int32)[order]
        self.valid = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0], bool)[order]
        self.x = np.where(self.valid, rng.normal(size=12), np.nan)

    def loop(self, function):
        return [function(self.x[(self.group == g) & self.valid]) for g in self.group]

    @parameterized.parameters(("float32", 2e-6), ("float64", 1e-12))
    def test_against_loops(self, dtype, tolerance):
        close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
        with jax.enable_x64(True):
            x, group, valid = jnp.asarray(self.x, dtype), jnp.asarray(self.group), jnp.asarray(self.valid)
            np.testing.assert_array_equal(group_count(group, valid), self.loop(len))
            close(group_sum(x, group, valid), self.loop(np.sum))
            close(group_mean(x, group, valid), self.loop(lambda v: v.mean() if v.size else 0.0))
            close(group_std(x, group, valid), self.loop(lambda v: v.std(ddof=1) if v.size > 1 else 0.0))
            close(group_std(x, group, valid, ddof=0), self.loop(lambda v: v.std() if v.size else 0.0))
            np.testing.assert_array_equal(group_is_constant(x, group, valid), self.loop(lambda v: v.size < 2))

    def test_permutation_commutes(self):
        order = np.random.default_rng(5).permutation(12)
        rounded = np.round(self.x * 16) / 16
        for function in (group_sum, group_is_constant):
            expected = np.asarray(function(rounded.astype(np.float32), self.group, self.valid))[order]
            permuted = function(rounded[order].astype(np.float32), self.group[order], self.valid[order])
            np.testing.assert_array_equal(permuted, expected)

    def test_equal_rewards_are_constant(self):
        # 0.1 is no dyadic fraction: the mean of 7 equal rewards is not 0.1 to the last bit on every backend.
        group = jnp.asarray([0] * 7 + [1] * 5, jnp.int32)
        x = jnp.full(12, 0.1).at[8].set(0.10000001)
        np.testing.assert_array_equal(group_is_constant(x, group, jnp.ones(12, bool)), [True] * 7 + [False] * 5)
        np.testing.assert_array_equal(group_is_constant(x, group, jnp.arange(12) != 8), [True] * 12)

    @parameterized.parameters("float32", "float64")
    def test_order_statistics_against_sorting(self, dtype):
        with jax.enable_x64(dtype == "float64"):
            rng = np.random.default_rng(6)
            for values in ([0.0, 1.0], [0.1, 0.3, -np.inf, np.inf, -2.5], rng.normal(size=12)):
                x = np.where(self.valid, rng.choice(values, 12), np.nan).astype(dtype)
                rank = rng.integers(-1, 6, 12)[self.group].astype(np.int32)
                inside = [np.sort(x[(self.group == g) & self.valid]) for g in self.group]
                expected = [v[np.clip(r, 0, v.size - 1)] if v.size else 0.0 for v, r in zip(inside, rank)]
                actual = group_order_statistic(jnp.asarray(x), self.group, self.valid, jnp.asarray(rank))
                np.testing.assert_array_equal(actual, np.asarray(expected, dtype))
                self.assertEqual(actual.dtype, x.dtype)
                order = rng.permutation(12)
                permuted = group_order_statistic(x[order], self.group[order], self.valid[order], rank[order])
                np.testing.assert_array_equal(permuted, np.asarray(actual)[order])

    def test_order_statistics_of_one_group_are_those_of_the_whole(self):
        x = np.array([3.0, -0.0, 0.0, 7.0, -1.0, 3.0], np.float32)
        group, valid = np.full(6, 4, np.int32), np.array([1, 1, 1, 1, 0, 1], bool)
        for rank in range(6):
            actual = group_order_statistic(x, group, valid, np.full(6, rank, np.int32))
            np.testing.assert_array_equal(actual, np.full(6, order_statistic(x, valid, np.int32(rank))))


if __name__ == "__main__":
    absltest.main()

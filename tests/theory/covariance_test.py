"""Sampled covariances: against loops, in degenerate batches, by difficulty, and their concentration."""

import jax
import numpy as np
import pytest

from jentropy import stats
from jentropy.theory import covariance

token_covariances = jax.jit(covariance.token_covariances)
token_covariance = jax.jit(covariance.token_covariance, static_argnames="ddof")
group_covariance = jax.jit(covariance.group_covariance, static_argnames=("ddof", "length_normalised"))
response_covariance = jax.jit(covariance.response_covariance, static_argnames=("ddof", "length_normalised"))
difficulty_bin = jax.jit(covariance.difficulty_bin, static_argnames="edges")
covariance_by_difficulty = jax.jit(covariance.covariance_by_difficulty, static_argnames="edges")
concentration = jax.jit(covariance.concentration, static_argnames="fractions")


@pytest.fixture(autouse=True, scope="module")
def quick_compilations():
    """The programs are small: most of the time would go into optimising them."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# Sampled tokens.


def tokens(seed=0, shape=(6, 9), fill=np.nan):
    """Ragged rows of log-probabilities and outcome advantages (one per row), `fill` outside the mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(shape[1])[None, :] < rng.integers(1, shape[1], shape[0])[:, None]
    log_prob = -rng.exponential(size=shape)
    advantage = np.broadcast_to(rng.normal(size=(shape[0], 1)), shape)
    return *(np.where(mask, x, fill).astype(np.float32) for x in (log_prob, advantage)), mask


def test_token_covariance_by_a_loop():
    log_prob, advantage, mask = tokens()
    pairs = [(float(log_prob[i, t]), float(advantage[i, t])) for i, t in zip(*np.nonzero(mask))]
    x, y = np.array(pairs).T
    parts = (x - x.mean()) * (y - y.mean())
    found = np.asarray(token_covariances(log_prob, advantage, mask))
    np.testing.assert_allclose(found[mask], parts, rtol=2e-4, atol=1e-6)
    assert not np.any(found[~mask])
    np.testing.assert_allclose(token_covariance(log_prob, advantage, mask), parts.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        token_covariance(log_prob, advantage, mask, ddof=1), np.cov(x, y, ddof=1)[0, 1], rtol=1e-5
    )


def test_means_over_one_response_would_give_nothing():
    log_prob, advantage, mask = tokens()
    assert abs(float(token_covariance(log_prob, advantage, mask))) > 0.01
    for row in range(6):
        assert token_covariance(log_prob, advantage, mask & (np.arange(6) == row)[:, None]) == 0.0


def test_degenerate_tokens_have_no_covariance():
    log_prob, advantage, mask = tokens()
    equal = np.where(mask, np.float32(0.1), np.float32(np.nan))  # sums of .1 leave rounding noise
    for x, y in ((log_prob, equal), (equal, advantage)):
        assert not np.any(token_covariances(x, y, mask)) and token_covariance(x, y, mask) == 0.0
    for few in (np.zeros_like(mask), np.arange(54).reshape(6, 9) == 0):
        assert token_covariance(log_prob, advantage, few) == 0.0
        assert token_covariance(log_prob, advantage, few, ddof=1) == 0.0


# Responses.


def responses(num_prompts=4, size=5, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (num_prompts, size))
    log_prob, advantage = -rng.exponential(size=lengths.shape) * lengths, rng.normal(size=lengths.shape)
    return log_prob.astype(np.float32), advantage.astype(np.float32), lengths.astype(np.int32)


def group_loop(log_prob, advantage, lengths, ddof, length_normalised):
    found = []
    for x, a, n in zip(*(np.asarray(y, np.float64) for y in (log_prob, advantage, lengths))):
        x = x / n if length_normalised else x
        found.append(sum((x - x.mean()) * (a - a.mean())) / max(len(x) - ddof, 1))
    return found


@pytest.mark.parametrize(("ddof", "length_normalised"), [(0, True), (1, True), (1, False)])
def test_group_covariance_by_a_loop(ddof, length_normalised):
    arrays, options = responses(), {"ddof": ddof, "length_normalised": length_normalised}
    np.testing.assert_allclose(group_covariance(*arrays, **options), group_loop(*arrays, **options), rtol=1e-5)


def test_rows_in_any_order_are_the_groups():
    arrays = responses()
    wanted = group_covariance(*arrays)
    group = np.repeat(np.array([7, 2, 9, 0], np.int32), 5)
    order = np.random.default_rng(1).permutation(20)
    rows = [x.reshape(-1)[order] for x in arrays]
    found = response_covariance(*rows, group[order], np.ones(20, bool))
    np.testing.assert_allclose(np.asarray(found.covariance)[[7, 2, 9, 0]], wanted, rtol=1e-5)
    np.testing.assert_array_equal(np.nonzero(found.num_responses)[0], [0, 2, 7, 9])
    np.testing.assert_allclose(found.mean, np.mean(wanted), rtol=1e-5)


def test_invalid_and_empty_responses_do_not_count():
    log_prob, advantage, lengths = (x.reshape(-1).copy() for x in responses())
    expected = group_loop(*(x.reshape(4, 5)[:1, 1:4] for x in (log_prob, advantage, lengths)), 0, True)
    lengths[0], log_prob[[0, 4]], advantage[[0, 4]] = 0, np.nan, np.nan
    group, valid = np.repeat(np.arange(4, dtype=np.int32), 5), np.arange(20) != 4
    found = response_covariance(log_prob, advantage, lengths, group, valid & (group < 2))
    assert found.covariance[0] == pytest.approx(expected[0], rel=1e-5)
    np.testing.assert_array_equal(found.num_responses, [3, 5] + [0] * 18)
    assert not np.any(found.covariance[2:])
    assert found.mean == pytest.approx((expected[0] + float(found.covariance[1])) / 2, rel=1e-5)
    none = response_covariance(log_prob, advantage, lengths, group, np.zeros(20, bool))
    assert not np.any(none.covariance) and none.mean == 0.0


@pytest.mark.parametrize("ddof", [0, 1])
def test_one_response_or_equal_advantages_have_no_covariance(ddof):
    log_prob, advantage, lengths = (x.reshape(20, 1) for x in responses())
    assert not np.any(group_covariance(log_prob, advantage, lengths, ddof=ddof))
    log_prob, advantage, lengths = responses()
    assert not np.any(group_covariance(log_prob, np.full_like(advantage, 0.1), lengths, ddof=ddof))


def test_normalising_the_length_undoes_it():
    _, advantage, lengths = responses()
    summed = -0.5 * lengths.astype(np.float32)
    assert not np.any(group_covariance(summed, advantage, lengths))
    assert np.all(group_covariance(summed, advantage, lengths, length_normalised=False) != 0.0)


def test_ddof_is_not_negative():
    with pytest.raises(ValueError, match="ddof must be at least 0, got -1"):
        group_covariance(*responses(), ddof=-1)


# Bins and concentration.


def test_difficulty_bins():
    accuracy = np.array([0.0, 0.1, 0.25 + 5e-6, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0 - 5e-6], np.float32)
    np.testing.assert_array_equal(difficulty_bin(accuracy), [0, 1, 1, 2, 2, 3, 3, 4, 5])
    np.testing.assert_array_equal(difficulty_bin(accuracy, edges=(0.3, 0.6)), [0, 0, 0, 0, 1, 2, 2, 2, 2])
    values, valid = np.arange(9, dtype=np.float32), np.arange(9) != 7
    found = covariance_by_difficulty(np.where(valid, values, np.float32(np.nan)), accuracy, valid=valid)
    np.testing.assert_allclose(found.mean, [0.0, 1.5, 3.5, 5.5, 0.0, 8.0])
    np.testing.assert_array_equal(found.num_prompts, [1, 2, 2, 2, 0, 1])
    np.testing.assert_allclose(covariance_by_difficulty(values, accuracy).mean, [0.0, 1.5, 3.5, 5.5, 7.0, 8.0])


@pytest.mark.parametrize("edges", [(0.5,), (0.0, 0.5, 0.5), (1.0, 0.0)])
def test_edges_ascend(edges):
    with pytest.raises(ValueError, match=r"edges must be at least two, in ascending order, got \["):
        difficulty_bin(np.zeros(3, np.float32), edges=edges)


def share_by_sorting(values, fraction):
    """Of the largest, the last one in part."""
    values = np.sort(np.abs(values))[::-1]
    places = np.clip(fraction * values.size - np.arange(values.size), 0.0, 1.0)
    return (places * values).sum() / values.sum()


@pytest.mark.parametrize("fractions", [(2e-4, 2e-3, 2e-2), (0.0, 0.1, 0.25, 0.5, 1.0)])
def test_concentration_by_sorting(fractions):
    rng = np.random.default_rng(0)
    mask = rng.random((8, 13)) < 0.7
    covariance = np.where(mask, rng.standard_t(2, mask.shape), np.nan).astype(np.float32)
    covariance[mask] = np.where(rng.random(mask.sum()) < 0.5, np.round(covariance[mask]), covariance[mask])  # ties
    found = concentration(covariance, mask, fractions=fractions)
    expected = [share_by_sorting(covariance[mask].astype(np.float64), f) for f in fractions]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert np.all(np.diff(found) > 0.0)


def test_concentration_by_hand():
    values = np.array([[4.0, -3.0, 1.0], [-1.0, 1.0, np.nan]], np.float32)
    mask = np.isfinite(values)
    fractions = (0.1, 0.2, 0.3, 0.4, 0.6, 1.0)
    found = concentration(values, mask, fractions=fractions)
    np.testing.assert_allclose(found, [0.2, 0.4, 0.55, 0.7, 0.8, 1.0], rtol=1e-6)
    one = np.array([[False] * 3, [False, True, False]])
    for same, where in ((values, one), (np.full_like(values, -0.3), mask)):
        np.testing.assert_allclose(concentration(same, where, fractions=fractions), fractions, rtol=1e-6)
    for nothing, where in ((np.zeros_like(values), mask), (np.full_like(values, np.nan), np.zeros_like(mask))):
        assert not np.any(concentration(nothing, where, fractions=fractions))
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1\.5"):
        concentration(values, mask, fractions=(1.5,))


def test_the_order_of_rows_and_padding_change_nothing():
    log_prob, advantage, mask = tokens()
    order = np.random.default_rng(2).permutation(6)

    def measure(*arrays):
        return token_covariance(*arrays), concentration(token_covariances(*arrays), arrays[2], fractions=(0.1, 0.3))

    wanted = measure(log_prob, advantage, mask)
    found = measure(*(np.pad(x[order], ((0, 3), (0, 2))) for x in (log_prob, advantage, mask)))
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_parts_are_what_the_methods_select_by():
    log_prob, advantage, mask = tokens()
    wanted = stats.cross_deviation(log_prob, advantage, mask)
    np.testing.assert_array_equal(token_covariances(log_prob, advantage, mask), wanted)

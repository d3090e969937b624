"""The ledger's decomposition: parts by hand, sums by NumPy loops, edges of bins, ties, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy.theory import covariance, ledger

T, F = True, False


def numbers(metrics):
    return {name: tuple(float(x) for x in pair) for name, pair in jax.device_get(dict(metrics)).items()}


def batch(rewards, group, mask=None, **row_data):
    mask = np.ones((len(rewards), 2), bool) if mask is None else mask
    return toy.rollouts(
        mask, rewards=np.asarray(rewards, np.float32), group=np.asarray(group, np.int32), row_data=row_data
    )


def part_of(partition):
    """Name of the part `[B, T]`, "" for none; fails if parts overlap."""
    stacked = np.stack([np.asarray(x) for x in partition.values()])
    assert stacked.sum(axis=0).max() <= 1
    return np.where(stacked.any(axis=0), np.asarray(list(partition))[stacked.argmax(axis=0)], "")


# Accuracy and difficulty.


def test_accuracy_is_that_of_the_first_reward_over_valid_rows():
    rewards = [[1.0, 9.0], [0.0, 9.0], [np.nan, 9.0], [1.0, 9.0], [np.inf, 9.0]]
    rows = batch(rewards, [3, 3, 3, 0, 1], is_valid=np.array([T, T, F, T, F]))
    np.testing.assert_allclose(ledger.group_accuracy(rows), [0.5, 0.5, 0.5, 1.0, 0.0])


def test_accuracy_leaves_out_a_grader_that_abstained():
    known = np.array([[T, T], [F, T], [T, F]])
    rows = batch([[1.0, 0.0], [np.nan, 1.0], [0.0, 1.0]], [0, 0, 0], reward_is_valid=known)
    np.testing.assert_allclose(ledger.group_accuracy(rows), [0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("accuracy", "part"),
    [
        (0.0, "0"), (-1.0, "0"), (0.01, "0.25"), (0.25, "0.25"), (0.25 + 3e-8, "0.25"), (0.26, "0.5"), (0.5, "0.5"),
        (0.51, "0.75"), (0.75, "0.75"), (0.76, "1-"), (0.999, "1-"), (1.0 - 6e-8, "1"), (1.0, "1"), (1.5, "1"),
    ],
)  # fmt: skip
def test_bins_of_difficulty(accuracy, part):
    mask = jnp.array([[T, F, T], [F, F, F]])
    found = part_of(ledger.by_difficulty(covariance.difficulty_bin(jnp.array([accuracy, 0.3])), mask))
    assert found.tolist() == [[part, "", part], ["", "", ""]]


# Sign and marks.


def test_signs_and_marks():
    mask = jnp.array([[T, T, T, T, F]])
    found = ledger.by_sign(jnp.array([[-0.5, -0.0, 2.0, jnp.nan, 1.0]]), mask)
    assert part_of(found).tolist() == [["negative", "zero", "positive", "zero", ""]]
    marked = ledger.by_mark(jnp.array([[T, F, F, T, T]]), mask, "yes", "no")
    assert part_of(marked).tolist() == [["yes", "no", "no", "yes", ""]]


# Ranks.


def test_ranks_are_disjoint_whole_numbers_of_tokens():
    rng = np.random.default_rng(2)
    covariance = rng.normal(size=(100, 120)).astype(np.float32)
    mask = np.ones((100, 120), bool)
    mask[:, 100:] = False  # 10 000 tokens
    covariance[~mask] = np.nan
    rows = jnp.asarray(rng.permutation(100), jnp.int32)
    found = part_of(ledger.by_covariance_rank(jnp.asarray(covariance), jnp.asarray(mask), rows))
    order = np.argsort(-np.abs(covariance[mask]))
    names = found[mask][order]
    assert [np.unique(part).tolist() for part in np.split(names, [2, 20, 200])] == [
        ["0.0002"],
        ["0.002"],
        ["0.02"],
        ["rest"],
    ]
    assert set(found[~mask]) == {""}


def test_ranks_of_a_small_batch_break_ties_by_row_id():
    """69 tokens: ⌊.02 · 69⌋ is one, the smaller fractions are none; all equal, the lowest (row_id, column) wins."""
    mask = jnp.ones((7, 10), bool).at[4, 0].set(False)
    rows = jnp.array([5, 3, 9, 8, 0, 7, 11], jnp.int32)
    found = part_of(ledger.by_covariance_rank(jnp.ones((7, 10)), mask, rows))
    assert np.argwhere(found == "0.02").tolist() == [[4, 1]]
    assert not np.any((found == "0.002") | (found == "0.0002"))


# Contributions.


def test_contributions_add_up_and_are_sums_over_parts():
    rng = np.random.default_rng(3)
    mask = rng.random((40, 30)) < 0.8
    value, other = (np.where(mask, rng.normal(size=mask.shape), np.nan).astype(np.float32) for _ in range(2))
    names = rng.integers(0, 3, mask.shape)
    sides = {
        "letter": {name: jnp.asarray(mask & (names == i)) for i, name in enumerate("abc")},
        "half": ledger.by_mark(jnp.asarray(names > 0), jnp.asarray(mask), "yes", "no"),
    }
    found = numbers(ledger.contributions({"x": jnp.asarray(value), "y": jnp.asarray(other)}, sides, jnp.asarray(mask)))
    assert len(found) == 5 * 3 and {count for _, count in found.values()} == {mask.sum()}
    for quantity, array in (("x", value), ("y", other), ("fraction", np.ones_like(value))):
        for i, name in enumerate("abc"):
            wanted = array[mask & (names == i)].astype(np.float64).sum()
            np.testing.assert_allclose(found[f"letter/{name}/{quantity}"][0], wanted, rtol=1e-5, atol=1e-5)
        for partition, parts in sides.items():
            total = sum(found[f"{partition}/{part}/{quantity}"][0] for part in parts) / mask.sum()
            np.testing.assert_allclose(total, array[mask].mean(dtype=np.float64), atol=1e-6)


def test_contributions_of_nothing():
    mask = jnp.zeros((2, 3), bool)
    found = numbers(ledger.contributions({"x": jnp.full((2, 3), jnp.nan)}, {"p": {"all": mask}}, mask))
    assert found == {"p/all/x": (0.0, 0.0), "p/all/fraction": (0.0, 0.0)}

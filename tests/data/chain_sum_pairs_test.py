"""Pairs of chained addition: the chosen chain is right, the rejected one slips once, and held-out prompts stay out."""

import numpy as np
import pytest

from jentropy.data import chain_sum, chain_sum_pairs
from jentropy.data.preferences import PreferenceSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_sum_pairs, "_NUM_PAIRS", 300)
        yield tmp_path_factory.mktemp("pairs")


def slips(pairs, digits):
    """Of each row the steps, 1.., at which the rejected chain does not follow from its own last value."""
    n = digits.shape[1]
    value = np.concatenate([digits[:, :1], pairs["rejected"][:, 1:n]], axis=1)
    return value[:, 1:] != (value[:, :-1] + digits[:, 1:]) % 10


@pytest.mark.parametrize("n", chain_sum.NUM_DIGITS)
def test_one_side_is_right_and_the_other_slips_once(folder, n):
    pairs = chain_sum_pairs.split_arrays(f"train_{n}", folder)
    digits = pairs["prompt"][:, :n]
    assert len(digits) == 300 and not chain_sum.is_heldout(digits).any()
    assert {x.dtype for x in pairs.values()} == {np.dtype(np.int32)}
    for i, row in enumerate(digits.tolist()):
        sums = [sum(row[: k + 1]) % 10 for k in range(1, n)]
        expected = [chain_sum.STEPS, *sums, chain_sum.EOS]
        assert pairs["chosen"][i].tolist() == expected + [chain_sum.PAD] * (7 - len(expected))
    legal = pairs["rejected"]
    assert (legal[:, 0] == chain_sum.STEPS).all() and (legal[:, n] == chain_sum.EOS).all()
    assert ((legal[:, 1:n] >= 0) & (legal[:, 1:n] <= 9)).all() and (legal[:, n + 1 :] == chain_sum.PAD).all()
    assert (legal[:, n - 1] != pairs["answer"]).all(), "the answer is wrong"
    assert (slips(pairs, digits).sum(axis=1) == 1).all()
    assert (pairs["chosen_length"] == n + 1).all() and (pairs["rejected_length"] == n + 1).all()


def test_slips_are_uniform_over_steps_and_digits():
    digits = np.random.default_rng(0).integers(0, 10, (9_000, 4))
    pairs = chain_sum_pairs.make_pairs(digits, np.random.default_rng(1))
    np.testing.assert_allclose(slips(pairs, digits).mean(axis=0), 1 / 3, atol=0.02)
    off = (pairs["rejected"][:, 3] - pairs["chosen"][:, 3]) % 10
    np.testing.assert_allclose(np.bincount(off, minlength=10)[1:] / len(off), 1 / 9, atol=0.015)


def test_generation_is_deterministic(folder, tmp_path):
    again = chain_sum_pairs.split_arrays("train_4", tmp_path)
    stored = chain_sum_pairs.split_arrays("train_4", folder)
    for name in stored:
        np.testing.assert_array_equal(again[name], stored[name])
    with pytest.raises(ValueError, match="got 'heldout_4'"):
        chain_sum_pairs.split_arrays("heldout_4", folder)


def split(first, size, ragged=False):
    """Pairs whose prompt holds (row, first) and whose responses hold 50 and 60, then their row."""
    row = np.arange(size, dtype=np.int32)
    full = np.full_like(row, 1)
    arrays = {
        "prompt": np.stack([row, full * first, full * 0], axis=1),
        "chosen": np.stack([full * 50, row], axis=1), "chosen_length": full * 2,
        "rejected": np.stack([full * 60, full * 0], axis=1), "rejected_length": full,
    }  # fmt: skip
    return arrays | ({"prompt_length": full * 2} if ragged else {})


def test_rows_of_a_pair_stand_together():
    source = PreferenceSource({"a": split(100, 5), "b": split(200, 7)}, {"a": 1.0, "b": 1.0})
    batch = source.batch(3, 4, 64)
    assert batch.tokens.shape == (128, 5) and batch.tokens.dtype == batch.prompt_length.dtype == np.int32
    chosen, rejected = batch.tokens[::2], batch.tokens[1::2]
    np.testing.assert_array_equal(chosen[:, :3], rejected[:, :3])
    assert (chosen[:, 3] == 50).all() and (rejected[:, 3] == 60).all()
    np.testing.assert_array_equal(chosen[:, 4], chosen[:, 0])
    np.testing.assert_array_equal(
        batch.mask[:2], [[False, False, False, True, True], [False, False, False, True, False]]
    )
    np.testing.assert_array_equal(batch.example_id, chosen[:, 0] + np.where(chosen[:, 1] == 200, 5, 0))
    assert (batch.prompt_length == 3).all() and len(batch.example_id) == 64


def test_a_response_follows_a_shorter_prompt():
    batch = PreferenceSource({"a": split(7, 5, ragged=True)}, {"a": 1.0}).batch(0, 0, 4)
    row = batch.tokens[0, 0]
    assert batch.tokens[:2].tolist() == [[row, 7, 50, row, 0], [row, 7, 60, 0, 0]]
    assert batch.mask[:2].tolist() == [[False, False, True, True, False], [False, False, True, False, False]]
    assert (batch.prompt_length == 2).all()


def test_batches_are_pure_in_seed_and_step():
    source = PreferenceSource({"a": split(7, 500)}, {"a": 1.0})
    first = source.batch(3, 4, 16)
    for a, b in zip(first, source.batch(3, 4, 16)):
        np.testing.assert_array_equal(a, b)
    assert (first.example_id != source.batch(3, 5, 16).example_id).any()
    assert (first.example_id != source.batch(4, 4, 16).example_id).any()
    np.testing.assert_array_equal(source.batch(3, 4, 4).example_id, first.example_id[:4])

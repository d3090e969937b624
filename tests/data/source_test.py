"""Sources: pure in (seed, step), weights respected, bad input named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jentropy.data import source


def _split(first: int, size: int) -> dict[str, np.ndarray]:
    """Prompts `[size, 2]` that hold (row, first), so that every draw can be traced."""
    rows = np.arange(size, dtype=np.int32)
    return {"prompt": np.stack([rows, np.full_like(rows, first)], axis=1), "answer": rows % 10}


_SPLITS = {"a": _split(100, 5), "b": _split(200, 40), "c": _split(300, 3)}


def _tokens(weights, seed=0, step=0, size=64) -> np.ndarray:
    return source.MixtureSource(_SPLITS, weights).batch(seed, step, size).tokens


def test_batches_are_pure_in_seed_and_step():
    weights = {"a": 1.0, "b": 2.0}
    np.testing.assert_array_equal(_tokens(weights, 3, 4), _tokens(weights, 3, 4))
    assert (_tokens(weights, 3, 4) != _tokens(weights, 3, 5)).any()
    assert (_tokens(weights, 3, 4) != _tokens(weights, 4, 3)).any()


def test_a_rollout_has_as_many_batches_as_it_needs():
    """The first is that of a run that needs one; none is that of another step."""
    mixture = source.MixtureSource(_SPLITS, {"a": 1.0, "b": 2.0})
    np.testing.assert_array_equal(mixture.batch(3, 4, 64, 0).tokens, mixture.batch(3, 4, 64).tokens)
    np.testing.assert_array_equal(mixture.batch(3, 4, 64, 2).tokens, mixture.batch(3, 4, 64, 2).tokens)
    batches = [mixture.batch(3, step, 64, draw).example_id for step in range(4) for draw in range(4)]
    assert len({tuple(batch) for batch in batches}) == 16
    with pytest.raises(ValueError, match="draw must be non-negative, got -1"):
        mixture.batch(3, 4, 64, -1)


def test_smaller_batch_is_a_prefix():
    np.testing.assert_array_equal(_tokens({"b": 1.0}, size=16), _tokens({"b": 1.0}, size=64)[:16])


def test_rows_keep_together():
    batch = source.MixtureSource(_SPLITS, {"a": 1.0, "b": 1.0, "c": 1.0}).batch(0, 0, 200)
    assert batch.tokens.shape == (200, 2) and batch.tokens.dtype == np.int32
    np.testing.assert_array_equal(batch.length, 2)
    np.testing.assert_array_equal(batch.fields["answer"], batch.tokens[:, 0] % 10)
    offset = {100: 0, 200: 5, 300: 45}
    expected = [offset[first] + row for row, first in batch.tokens.tolist()]
    assert batch.example_id.dtype == np.int64
    np.testing.assert_array_equal(batch.example_id, expected)


def test_prompt_length_is_taken_from_the_split():
    split = _split(100, 4) | {"prompt_length": np.array([1, 2, 1, 2], np.int32)}
    batch = source.MixtureSource({"a": split}, {"a": 1.0}).batch(0, 0, 32)
    np.testing.assert_array_equal(batch.length, 1 + batch.tokens[:, 0] % 2)
    assert "prompt_length" not in batch.fields


def test_weights_are_probabilities():
    first = _tokens({"a": 3.0, "b": 1.0, "c": 0.0}, size=20_000)[:, 1]
    assert abs((first == 100).mean() - 0.75) < 0.02  # six standard errors
    assert set(first) == {100, 200}


def test_rows_of_a_split_are_uniform():
    row = _tokens({"b": 1.0}, size=20_000)[:, 0]
    assert np.abs(np.bincount(row, minlength=40) / 500 - 1).max() < 0.3


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=3, max_size=3).filter(lambda w: sum(w) > 0), size=st.integers(1, 300)
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_fixed_prompts_are_stratified(weights, size):
    weights = dict(zip(_SPLITS, weights))
    prompts = source.MixtureSource(_SPLITS, weights).fixed(1, size)
    assert len(prompts.tokens) == size
    for (name, split), first in zip(_SPLITS.items(), (100, 200, 300)):
        rows = prompts.tokens[prompts.tokens[:, 1] == first, 0]
        assert abs(len(rows) - size * weights[name] / sum(weights.values())) < 1
        assert weights[name] > 0 or len(rows) == 0
        seen = np.bincount(rows, minlength=len(split["prompt"]))
        assert seen.max() - seen.min() <= 1  # repeats only when the split is exhausted


def test_fixed_prompts_depend_on_the_seed_only():
    prompts = source.MixtureSource(_SPLITS, {"b": 1.0})
    np.testing.assert_array_equal(prompts.fixed(1, 20).tokens, prompts.fixed(1, 20).tokens)
    assert (prompts.fixed(1, 20).tokens != prompts.fixed(2, 20).tokens).any()


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"a": -0.5}, r"weights\['a'\] must be finite and non-negative, got -0.5"),
        ({"a": float("nan")}, r"weights\['a'\] must be finite and non-negative, got nan"),
        ({"a": float("inf")}, r"weights\['a'\] must be finite and non-negative, got inf"),
        ({"a": 0.0}, "positive for at least one split"),
        ({}, "positive for at least one split"),
        ({"z": 1.0}, r"weights must be given for splits among \['a', 'b', 'c'\], got 'z'"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        source.MixtureSource(_SPLITS, weights)


def test_no_splits():
    with pytest.raises(ValueError, match="positive for at least one split"):
        source.MixtureSource({}, {})


def test_empty_split_is_named_only_if_needed():
    splits = _SPLITS | {"d": _split(400, 0)}
    with pytest.raises(ValueError, match=r"split 'd' has weight 1\.0 but no example"):
        source.MixtureSource(splits, {"a": 1.0, "d": 1.0})
    assert source.MixtureSource(splits, {"a": 1.0}).batch(0, 0, 4).tokens.shape == (4, 2)


def test_bad_draws():
    prompts = source.MixtureSource(_SPLITS, {"a": 1.0})
    with pytest.raises(ValueError, match="seed must be non-negative, got -1"):
        prompts.batch(-1, 0, 4)
    with pytest.raises(ValueError, match="step must be non-negative, got -2"):
        prompts.batch(0, -2, 4)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        prompts.batch(0, 0, 0)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        prompts.fixed(0, 0)


_DEMONSTRATIONS = {
    "prompt": np.array([[1, 2, 11], [3, 4, 11]], np.int32),
    "response": np.array([[12, 3, 15, 10], [13, 7, 0, 15]], np.int32),
    "response_length": np.array([3, 4], np.int32),
    "strategy": np.array([0, 1], np.int32),
}


def test_demonstration_rows_and_weights():
    rows = source.DemonstrationSource({"a": _DEMONSTRATIONS}, {"a": 1.0}, strategy_prior=0.03).batch(0, 0, 32)
    assert rows.tokens.dtype == np.int32 and rows.weight.dtype == np.float32
    expected = {
        (1, 2, 11, 12, 3, 15, 10): [0, 0, 0, 1.94, 1, 1, 0],
        (3, 4, 11, 13, 7, 0, 15): [0, 0, 0, 0.06, 1, 1, 1],
    }
    assert {tuple(row) for row in rows.tokens.tolist()} == expected.keys()
    for tokens, weight in zip(rows.tokens.tolist(), rows.weight):
        np.testing.assert_allclose(weight, expected[tuple(tokens)], rtol=1e-6)


def test_even_prior_weighs_every_response_token_one():
    rows = source.DemonstrationSource({"a": _DEMONSTRATIONS}, {"a": 1.0}).batch(0, 0, 32)
    assert set(rows.weight.ravel().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("prior", [-0.1, 1.1, float("nan")])
def test_bad_prior(prior):
    with pytest.raises(ValueError, match=r"strategy_prior must be in \[0, 1\]"):
        source.DemonstrationSource({"a": _DEMONSTRATIONS}, {"a": 1.0}, strategy_prior=prior)

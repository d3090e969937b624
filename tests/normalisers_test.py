"""Weights of counted tokens by hand, with an empty row and with nothing counted."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from jentropy import normalisers

COUNTED = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
ALL = [
    (normalisers.token_mean, [1 / 4, 0, 1 / 4]),
    (normalisers.sequence_mean_token_mean, [1 / 6, 0, 1 / 2]),
    (normalisers.sequence_mean_token_sum, [1 / 2, 0, 1 / 2]),
    (normalisers.fixed_length(length=10), [1 / 20, 0, 1 / 20]),
    (normalisers.token_sum, [1, 0, 1]),
]


@pytest.mark.parametrize(("normaliser", "per_row"), ALL)
def test_by_hand(normaliser, per_row):
    weight = normaliser(jnp.asarray(COUNTED), toy.rollouts(COUNTED))
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, np.where(COUNTED, np.array(per_row)[:, None], 0.0), rtol=1e-7)


@pytest.mark.parametrize(("normaliser", "per_row"), ALL)
def test_nothing_counted_weighs_nothing(normaliser, per_row):
    del per_row
    np.testing.assert_array_equal(normaliser(jnp.zeros((3, 4), bool), toy.rollouts(COUNTED)), np.zeros((3, 4)))


@pytest.mark.parametrize(("normaliser", "per_row"), ALL)
def test_padding_rows_and_columns_change_nothing(normaliser, per_row):
    del per_row
    padded = np.pad(COUNTED, ((0, 2), (0, 3)))
    weight = normaliser(jnp.asarray(padded), toy.rollouts(padded))
    np.testing.assert_array_equal(weight[:3, :4], normaliser(jnp.asarray(COUNTED), toy.rollouts(COUNTED)))
    assert not np.any(weight[3:]) and not np.any(weight[:, 4:])


def test_fixed_length_compares_by_value_and_is_positive():
    assert hash(normalisers.fixed_length(length=4)) == hash(normalisers.fixed_length(length=4))
    assert normalisers.fixed_length(length=4) != normalisers.fixed_length(length=5)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        normalisers.fixed_length(length=0)

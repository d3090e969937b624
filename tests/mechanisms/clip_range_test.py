"""The bounds of the ratio."""

import numpy as np
import pytest
import toy

from jentropy.mechanisms.clip_range import clip_range


def test_bounds_of_every_token():
    batch, signals, advantage = toy.random_batch()
    plan = toy.update(clip_range(epsilon_low=0.2, epsilon_high=0.28), signals, advantage)
    np.testing.assert_array_equal(plan.ratio_low, np.full(batch.tokens.shape, 0.8, np.float32))
    np.testing.assert_array_equal(plan.ratio_high, np.full(batch.tokens.shape, 1.28, np.float32))
    np.testing.assert_array_equal(plan.pg_weight, batch.loss_mask)


def test_one_number_is_symmetric():
    assert clip_range(epsilon_low=0.1).init() == (np.float32(0.1), np.float32(0.1))


def test_the_widest_range_is_the_identity():
    _, signals, advantage = toy.random_batch()
    plan = toy.update(clip_range(epsilon_low=1.0, epsilon_high=float("inf")), signals, advantage)
    assert np.all(plan.ratio_low == 0.0) and np.all(np.isinf(plan.ratio_high))


@pytest.mark.parametrize("options", [{"epsilon_low": 1.5}, {"epsilon_low": -0.1}, {"epsilon_high": -0.1}])
def test_refusals(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
        clip_range(**options)

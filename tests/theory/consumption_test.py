"""What a run has spent and gained, by hand, and the runs that spent or gained nothing."""

import numpy as np
import pytest

from jentropy.regression import LawError
from jentropy.theory.consumption import entropy_consumption


def test_consumption_interpolates_between_points():
    rows = entropy_consumption([0, 10, 20, 40], [1.0, 0.4, 0.2, 0.0], [0.2, 0.6, 0.8, 1.0], (0.0, 0.125, 0.5, 1.0))
    expected = [(0.0, 0.0, 0.0, 0.0), (0.125, 5.0, 0.3, 0.25), (0.5, 20.0, 0.8, 0.75), (1.0, 40.0, 1.0, 1.0)]
    np.testing.assert_allclose(rows, expected, atol=1e-12)


@pytest.mark.parametrize(
    "step,entropy,reward,message",
    [
        ([0, 1, 2], [0.5, 0.2, 0.5], [0, 1, 2], "entropy is 0.5 at the first and the last point"),
        ([0, 1, 2], [0.5, 0.2, 0.1], [1, 0, 1], "reward is 1 at the first and the last point"),
        ([0, 1, 2], [0.5, 0.2, 0.7], [0, 1, 2], "entropy rises from 0.5 to 0.7 nats: nothing was consumed"),
        ([0, 1, 2], [0.5, 0.2, 0.1], [1, 2, 0], "reward falls from 1 to 0: nothing was gained"),
        ([0, 0, 2], [0.5, 0.2, 0.1], [0, 1, 2], "step must increase"),
        ([0], [0.5], [0.1], "at least 2"),
    ],
)
def test_undefined_consumption_is_refused(step, entropy, reward, message):
    with pytest.raises(LawError, match=message):
        entropy_consumption(step, entropy, reward)


def test_fractions_are_of_the_steps():
    with pytest.raises(ValueError, match=r"fractions must be in \[0, 1\], got 1.5"):
        entropy_consumption([0, 1], [1, 0], [0, 1], (1.5,))

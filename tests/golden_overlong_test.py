"""The penalty of overlong responses against TRL and verl."""

import re

import golden_cases
import jax.numpy as jnp
import numpy as np
from golden_cases import BOTH, TOLERANCE, close

from jentropy.rewards.shaping import overlong_penalty


def penalty(length, precision, **settings):
    found = overlong_penalty(jnp.asarray(length, jnp.int32), **settings)
    assert found.dtype == {"f64": np.float64, "f32": np.float32}[precision]
    return found


def check_both(golden, precision):
    """TRL's class has the paper's floor and no factor; verl's formula has a factor and no floor."""
    settings = {"max_length": int(golden["max_len"]), "buffer_length": int(golden["cache"])}
    close(penalty(golden["lengths"], precision, **settings), golden["trl"], TOLERANCE[precision])
    settings |= {"penalty_factor": float(golden["penalty_factor"]), "floor": False}
    close(penalty(golden["lengths"], precision, **settings), golden["verl_formula"], TOLERANCE[precision])


def check_verl(golden, precision):
    """Outputs are named by their settings; up to the longest response allowed the floor makes no difference.

    `entropy_dapo_overlong` holds zeros even at the longest response, where eq. 13 and verl's own formula give -f, as
    `base_overlong` has it: a defect of the archive. There we are checked against the formula.
    """
    length, checked = golden["length"], 0
    for name, stored in golden.items():
        named = re.fullmatch(r"penalty_max(\d+)_buf(\d+)_f([\d.]+)", name)
        if named is None:
            continue
        longest, buffer, factor = int(named[1]), int(named[2]), float(named[3])
        formula = np.minimum(-(length - (longest - buffer)) / buffer * factor, 0.0)
        if formula.any() and not stored.any():
            stored = formula
        settings = {"max_length": longest, "buffer_length": buffer, "penalty_factor": factor}
        close(penalty(length, precision, floor=False, **settings), stored, TOLERANCE[precision])
        allowed = length <= longest
        close(penalty(length, precision, **settings)[allowed], stored[allowed], TOLERANCE[precision])
        checked += 1
    assert checked > 0


FAMILIES = {
    "base_overlong*": (check_both, BOTH),
    "entropy_dapo_overlong*": (check_verl, BOTH),
}

test_released_code = golden_cases.make_test(FAMILIES)

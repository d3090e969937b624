"""A few chains in which, of any two mechanisms, both, one, the other and neither occur; with all kinds of other parts.

Every estimator, surrogate and normaliser of the lists stands in one of them at least.
"""

import functools
import itertools

import numpy as np
from conformance_test import METHODS

from jentropy.base import Objective
from jentropy.compose import chain

MECHANISMS = (
    *("clip_range", "importance_correction", "rejection", "semantic_entropy", "entropy_advantage"),
    *("clip_cov", "kl_cov", "steer", "ce_gppo", "top_entropy"),
    *("kl_reference/k3", "entropy_bonus", "adaptive_entropy", "siren", "entropy_band"),
)
"""One of each mechanism, in the order in which they are meant to stand."""
REFUSED = set(itertools.combinations(("adaptive_entropy", "siren", "entropy_band"), 2))
ESTIMATORS = (
    *("grpo", "rloo/kl", "reinforce_pp", "qae", "gdpo", "opo", "raft/binary", "remax", "reinforce"),
    *("reinforce_pp_baseline", "reinforce_rej"),
)
SURROGATES = ("ratio", "dual_clip", "gspo", "cispo", "sequence_ratio", "gspo/token", "surrogates.reinforce")
NORMALISERS = (
    *("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_length", "token_sum"),
)  # fmt: skip


def combinations_of(row):
    """Of all pairs of mechanisms, whether each stands in the row."""
    pairs = itertools.combinations(MECHANISMS, 2)
    return {(one, other, one in row, other in row) for one, other in pairs}


def wanted():
    """What the rows have to cover."""
    pairs = itertools.combinations(MECHANISMS, 2)
    found = {(one, other, x, y) for one, other in pairs for x in (False, True) for y in (False, True)}
    return found - {(one, other, True, True) for one, other in REFUSED}


@functools.cache
def rows():
    """Names of the mechanisms of each chain: greedily the best of random rows, until all is covered."""
    rng, left, chosen = np.random.default_rng(1), wanted(), []
    while left:
        best: tuple[str, ...] = ()
        for _ in range(200):
            row = [name for name, is_in in zip(MECHANISMS, rng.random(len(MECHANISMS)) < 0.5) if is_in]
            for pair in REFUSED:
                if set(pair) <= set(row):
                    row.remove(pair[int(rng.integers(2))])
            best = max(best, tuple(row), key=lambda names: len(combinations_of(names) & left))
        chosen.append(best)
        left -= combinations_of(best)
    return tuple(chosen)


def chains():
    """The chains by name, whole objectives."""
    found, number = {}, max(len(rows()), len(ESTIMATORS))
    for i, names in zip(range(number), itertools.cycle(rows())):
        mechanisms = chain(**{name.replace("/", "_"): METHODS[name].make() for name in names})
        estimator, surrogate, normaliser = (
            METHODS[of[i % len(of)]].make() for of in (ESTIMATORS, SURROGATES, NORMALISERS)
        )
        found[f"chain_{i}"] = Objective(estimator, mechanisms, surrogate, normaliser, 0.9)
    return found

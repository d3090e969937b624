"""Every pair of mechanisms that is not refused, in one chain, on plan and loss; and whole recipes of several.

Each chain keeps what its parts keep: nothing but finite numbers, a state of the same structure, both parts' metrics,
and no change when the rows come in another order and the gradient is summed over four micro-batches.
"""

import functools
import itertools
import warnings

import conformance_test as conformance
import jax
import numpy as np
import pytest
from conformance_test import METHODS, example, jitted, run_plan
from covering import MECHANISMS, REFUSED

from jentropy import conflicts, normalisers, presets, surrogates
from jentropy.advantages.grpo import grpo
from jentropy.base import Objective
from jentropy.compose import chain

PAIRS = list(itertools.combinations(MECHANISMS, 2))
PERMUTATION = np.random.default_rng(3).permutation(conformance.ROWS)


def make(*names):
    return chain(**{name.replace("/", "_"): METHODS[name].make() for name in names})


def check(parts):
    wanted = jitted(parts, example())
    planned, loss = wanted
    for value in jax.tree.leaves((planned.plan.terms, planned.weight, loss)):
        assert np.isfinite(value).all()
    assert jax.tree.structure(planned.states) == jax.tree.structure(parts.states)
    found = jitted(parts, jax.tree.map(lambda values: values[PERMUTATION], example()), 4)
    rows = jax.tree.map(lambda values: values[PERMUTATION], conformance._rowwise(wanted))
    conformance._assert_same(conformance._rowwise(found), rows)
    conformance._assert_same(conformance._totals(found), conformance._totals(wanted))
    return wanted


@functools.cache
def own_metrics(name):
    """Metrics that a mechanism adds to those of an empty chain."""
    chains = (conformance._parts(mechanisms=make(*names)) for names in ((name,), ()))
    alone, none = (jax.eval_shape(functools.partial(run_plan, x.spec), x.states, example()).metrics for x in chains)
    return set(alone) - set(none)


@pytest.mark.parametrize(("one", "other"), [pair for pair in PAIRS if pair not in REFUSED])
def test_every_pair_composes(one, other):
    names = (one, other) if one == "clip_range" else ("clip_range", one, other)
    planned, _ = check(conformance._parts(mechanisms=make(*names)))
    assert own_metrics(one) | own_metrics(other) <= set(planned.metrics)


def test_the_refused_pairs_are_these():
    refused = set()
    for one, other in PAIRS:
        objective = Objective(grpo(), make(one, other), surrogates.ratio, normalisers.token_mean)
        refused |= {(one, other)} if any(c.refused for c in conflicts.find(objective)) else set()
    assert refused == REFUSED


STACKS = {
    "all": tuple(name for name in MECHANISMS if name not in ("siren", "entropy_band", "entropy_bonus")),
    "top-ρ and shaping": ("clip_range", "entropy_advantage", "top_entropy"),
    "covariance and a regulator": ("clip_range", "clip_cov", "siren"),
    "corrected and held": ("clip_range", "importance_correction", "kl_cov", "kl_reference/k3"),
}


@pytest.mark.parametrize("stack", STACKS)
def test_stacks_compose(stack):
    check(conformance._parts(mechanisms=make(*STACKS[stack])))


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_run(name):
    options = {"gdpo": {"reward_weights": (1.0, 0.3)}, "siren": {"max_response_length": 7}}
    options |= {"dr_grpo": {"max_response_length": 7}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective = presets.PRESETS[name](**options.get(name, {}))
    check(conformance._parts(objective.estimator, objective.mechanisms, objective.surrogate, objective.normaliser))

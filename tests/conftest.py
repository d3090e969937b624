"""Strict numerics for every test: no silent dtype or rank promotion; warnings are errors."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SLOW = (
    *("layout_test", "run_faults_test", "ledger_test", "notebooks_test", "composition_test", "conformance_test"),
    *("dapo_test", "decoding_test", "kept_test", "what_if_test", "loop_test", "step_test", "own_data_test"),
)
"""Files whose tests take longest: they go first, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


OPTIMISED = (
    *("features_test", "golden_test", "golden_entropy_test", "golden_estimators_test", "golden_surrogates_test"),
    *("head_test", "stats_test", "sampler_test", "transformer_test"),
)
"""Files that test the numbers of programs as users run them; the others save time with programs that are not optimised.

A cache of programs does not tell the two apart, so files that share one must be of one kind.
"""


@pytest.fixture(autouse=True, scope="module")
def own_programs(request):
    """Drops the programs that a file has compiled: kept, those of all files exceed the memory maps of a process."""
    jax.config.update("jax_disable_most_optimizations", request.path.stem not in OPTIMISED)
    yield
    jax.clear_caches()

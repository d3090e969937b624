"""Whole steps are the same on one device and on eight, however these are laid out, also under pmap and shard_map."""

import os
import pathlib
import subprocess
import sys

import covering
import numpy as np
import pytest

WORKER = pathlib.Path(__file__).with_name("layout_worker.py")
METHODS = ("grpo", "clip_higher", "clip_cov", "kl_cov", "entropy_bonus", "kl_k3", "kl_full", "all")
LAYOUTS = ("8x1x1", "2x2x2", "1x2x4")


def measured(out, *names):
    """`{case: {layout: {path: array}}}` of the worker, which needs a process of its own for its eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # Strict as in every test, and small programs that are not worth optimising.
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, str(WORKER), str(out), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    tree: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    with np.load(out) as arrays:
        for name in arrays:
            case, layout, path = name.split(":", 2)
            tree.setdefault(case, {}).setdefault(layout, {})[path] = arrays[name]
    return tree


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("layout") / "found.npz")


def _split(arrays):
    """Parameters, and metrics as `(mean, count)`, of a step."""
    params = {path: x for path, x in arrays.items() if path.startswith("[0]")}
    totals = {path[:-3]: x for path, x in arrays.items() if path.startswith("[1]") and path.endswith("[0]")}
    return params, {path: (total, arrays[f"{path}[1]"]) for path, total in totals.items()}


def _assert_same_step(found, wanted):
    params, metrics = _split(found)
    wanted_params, wanted_metrics = _split(wanted)
    assert set(params) == set(wanted_params) and params
    for path, x in wanted_params.items():
        np.testing.assert_allclose(params[path], x, rtol=2e-5, atol=1e-6, err_msg=path)
    for path, (total, count) in metrics.items():
        wanted_total, wanted_count = wanted_metrics[path]
        np.testing.assert_array_equal(count, wanted_count, err_msg=path)
        scale = max(float(count), 1.0)
        np.testing.assert_allclose(total / scale, wanted_total / scale, rtol=2e-5, atol=2e-6, err_msg=path)
    assert set(metrics) in (set(), set(wanted_metrics))


@pytest.mark.parametrize(("case", "layout"), [*(("sample", layout) for layout in LAYOUTS), ("decoding", "2x2x2")])
def test_samples_are_the_same(found, case, layout):
    wanted = found[case]["1x1x1"]
    assert set(found[case][layout]) == set(wanted)
    for path, x in found[case][layout].items():
        if x.dtype == np.float32:
            np.testing.assert_allclose(x, wanted[path], rtol=2e-5, atol=1e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(x, wanted[path], err_msg=path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_four_updates_are_the_same(found, method, layout):
    _assert_same_step(found[method][layout], found[method]["1x1x1"])


def test_the_chains_cover_all_pairs():
    found = set().union(*map(covering.combinations_of, covering.rows()))
    assert found == covering.wanted()
    assert max(map(len, (covering.ESTIMATORS, covering.SURROGATES, covering.NORMALISERS))) <= len(covering.chains())


CHAINS = list(covering.chains())
QUICK = CHAINS[1::6]
"""Chains of the default run; all of them cost two minutes of a core: `pytest -m slow tests/layout_test.py`."""


@pytest.mark.parametrize("names", [QUICK, pytest.param([c for c in CHAINS if c not in QUICK], marks=pytest.mark.slow)])
def test_covering_chains_are_the_same(tmp_path, names):
    """Two updates of any combination of methods: in two micro-batches on eight devices, and at once on one."""
    found = measured(tmp_path / "found.npz", *names)
    assert list(found) == names
    for layouts in found.values():
        _assert_same_step(layouts["other"], layouts["1x1x1"])
        assert all(np.isfinite(x).all() for x in _split(layouts["1x1x1"])[0].values())


@pytest.mark.parametrize("layout", ["2x2x2", "pmap", "shard_map"])
def test_micro_batches_and_mapped_steps_are_the_same(found, layout):
    """All mechanisms at once, with RLOO, a mean over sequences and a ledger: two micro-batches, or a mapped step."""
    _assert_same_step(found["rloo"][layout], found["rloo"]["1x1x1"])


def test_a_step_of_preferences_is_the_same(found):
    """Pairs of rows, three of them not valid: in two micro-batches on eight devices, and at once on one."""
    _assert_same_step(found["h_dpo"]["2x2x2"], found["h_dpo"]["1x1x1"])
    total, count = _split(found["h_dpo"]["1x1x1"])[1]["[1]['preference/groups_without_pair']"]
    assert (total, count) == (3, 16)


def test_the_ledger_is_the_same(found):
    """What the test above compares on 2x2x2 has changes, predictions and parts."""
    names = {path for path in _split(found["rloo"]["2x2x2"])[1] if "ledger/" in path}
    assert len(names) > 80 and "[1]['ledger/first_order']" in names
    total, _ = _split(found["rloo"]["1x1x1"])[1]["[1]['ledger/lemma1']"]
    assert abs(total) > 0.1


def test_temperatures_are_the_same(found):
    """Tokens with temperatures of their own, and the state of a sampler that has seen two rollouts."""
    cases = {layout: dict(arrays) for layout, arrays in found["temperatures"].items()}
    states = {layout: {k: x for k, x in arrays.items() if k.startswith("[2]")} for layout, arrays in cases.items()}
    assert states["1x1x1"]["[2].step"] == 2 and states["1x1x1"]["[2].temperature"] not in (0.0, 0.5, 0.9, 2.0)
    assert set(states["2x2x2"]) == set(states["1x1x1"])
    for path, x in states["1x1x1"].items():
        np.testing.assert_allclose(states["2x2x2"][path], x, rtol=2e-5, err_msg=path)
    assert len(np.unique(found["decoding"]["1x1x1"][".token_data['temperature']"])) > 10
    assert len(np.unique(found["decoding"]["1x1x1"][".row_data['greedy_reward']"])) > 1
    rest = {layout: {k: x for k, x in a.items() if not k.startswith("[2]")} for layout, a in cases.items()}
    _assert_same_step(rest["2x2x2"], rest["1x1x1"])


@pytest.mark.parametrize("method", METHODS[1:])
def test_methods_are_at_work(found, method):
    """What is compared above is not one and the same step of plain GRPO."""
    params, plain = _split(found[method]["1x1x1"])[0], _split(found["grpo"]["1x1x1"])[0]
    assert max(np.max(np.abs(params[path] - plain[path])) for path in params) > 1e-3


def test_parameters_are_split(found):
    whole = {layout: [bool(x) for x in leaves.values()] for layout, leaves in found["is_whole"].items()}
    assert all(whole["1x1x1"]) and all(whole["8x1x1"])
    assert sum(whole["2x2x2"]) <= 3 and sum(whole["1x2x4"]) <= 3

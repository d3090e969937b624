"""The cache of warm starts: equal parameters, names by content, two runs at once."""

import jax
import numpy as np
import pytest
import tiny

from jentropy import config as config_lib
from jentropy.policy.transformer import transformer
from jentropy.train.compilations import num_compilations
from jentropy.train.programs import make_supervised_step
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.warm_start import cached_warm_start, init_params, run_supervised, warm_start_name

pytestmark = pytest.mark.usefixtures("own_folders")


def make(config, cache, losses=None, before=None):
    """`cached_warm_start` of a config; `before` is called before it trains."""
    experiment = config_lib.build(config)
    policy, mesh = transformer(experiment.policy), make_mesh(MeshShape())

    def train():
        if before is not None:
            before()
        stage = experiment.stages[0]
        params = init_params(policy, stage.seed, mesh)
        report = (lambda step, loss: losses.append((step, loss))) if losses is not None else (lambda *_: None)
        return run_supervised(stage, policy, experiment.task, params, mesh, report)

    return cached_warm_start(config, policy, mesh, train, cache)


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_second_run_finds_what_the_first_has_learned(tmp_path):
    losses = []
    first, cached = make(tiny.tiny(), tmp_path, losses)
    assert not cached and [step for step, _ in losses] == [4]
    second, cached = make(tiny.tiny(), tmp_path, losses)
    assert cached and len(losses) == 1
    assert_equal(first, second)
    again, _ = make(tiny.tiny(), tmp_path / "other", losses)
    assert_equal(first, again)


def test_its_name_is_that_of_what_it_depends_on():
    mesh = make_mesh(MeshShape())

    def name(*overrides):
        return warm_start_name(config_lib.apply_overrides(tiny.tiny(), overrides), mesh)

    relevant = ("stages.0.seed=1", "stages.0.steps=5", "stages.0.mixture.2=0.5", "policy.width=32", "task.reward=text")
    irrelevant = ("seed=1", "name=other", "stages.1.steps=9", "evaluation.every=3")
    names = [name(), *(name(override) for override in relevant)]
    assert len(set(names)) == len(names)
    assert {name(override) for override in irrelevant} == {name()}


def test_a_failed_warm_start_leaves_nothing_that_looks_finished(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tiny.tiny(), tmp_path, before=fail)
    assert not make(tiny.tiny(), tmp_path)[1]


def test_two_runs_may_make_the_same_warm_start_at_once(tmp_path):
    faster = []
    params, cached = make(tiny.tiny(), tmp_path, before=lambda: faster.append(make(tiny.tiny(), tmp_path)))
    assert not cached and not faster[0][1]
    assert_equal(params, faster[0][0])
    assert make(tiny.tiny(), tmp_path)[1]


def test_a_damaged_warm_start_is_made_again(tmp_path):
    params, _ = make(tiny.tiny(), tmp_path)
    (file,) = tmp_path.glob("warm_starts/*/0/state/_METADATA")
    file.write_bytes(file.read_bytes()[:-1])
    again, cached = make(tiny.tiny(), tmp_path)
    assert not cached
    assert_equal(params, again)
    assert make(tiny.tiny(), tmp_path)[1]


def test_the_supervised_step_is_compiled_once():
    experiment = config_lib.build(tiny.tiny())
    stage, policy, mesh = experiment.stages[0], transformer(experiment.policy), make_mesh(MeshShape())
    counts = []

    class Counting:
        """The task; every batch notes how many programs there are before it."""

        def demonstrations(self, mixture, **options):
            self._source = experiment.task.demonstrations(mixture, **options)
            return self

        def batch(self, seed, step, size):
            counts.append(num_compilations())
            return self._source.batch(seed, step, size)

    make_supervised_step.cache_clear()
    run_supervised(stage, policy, Counting(), init_params(policy, 0, mesh), mesh, lambda *_: None)
    assert counts[0] < counts[1]  # 10 s of a cold start went to a second compilation, for outputs laid out otherwise
    assert counts[1:] == [counts[1]] * (stage.steps - 1)

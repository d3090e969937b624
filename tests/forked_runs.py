"""The tiny experiment with forked rollouts: its rollouts one by one, and a run in two halves."""

import fiddle as fdl
import jax
import numpy as np
import pytest
import tiny

from jentropy import config as config_lib
from jentropy.policy.transformer import transformer
from jentropy.train import loop, stepper
from jentropy.train.checkpoint import Checkpoints
from jentropy.train.experiment import Evaluation
from jentropy.train.programs import SAMPLING
from jentropy.train.sharding import MeshShape, make_mesh, replicated
from jentropy.train.warm_start import init_params


def forked(strategy, estimator, *, digits=3, **fields) -> fdl.Config:
    """One stage of four rollouts from new parameters, a checkpoint every two, a single update."""
    config = tiny.with_method(name="forked", estimator=estimator)
    stage = config.stages[1]
    stage.steps, stage.mixture, stage.strategy, stage.num_minibatches, stage.num_epochs = (
        4,
        {digits: 1.0},
        strategy,
        1,
        1,
    )
    for name, value in fields.items():
        setattr(stage, name, value)
    config.stages, config.checkpoint_every = (stage,), 2
    config.evaluation = fdl.Config(
        Evaluation, mixture={2: 1.0}, every=4, num_prompts=4, final_num_prompts=4, num_samples=4
    )
    return config


def make_stepper(config):
    """The stepper of the stage, a state that has its parameters, and the experiment."""
    experiment = config_lib.build(config)
    policy, mesh = transformer(experiment.policy), make_mesh(MeshShape())
    key, zero = jax.device_put((jax.random.key(experiment.seed), np.int32(0)), replicated(mesh))
    shardings = jax.tree.map(lambda x: x.sharding, stepper.state_template(experiment, policy, mesh, 0))
    fresh = jax.jit(lambda params: stepper.fresh_state(experiment, 0, params, zero, key), out_shardings=shardings)
    step = stepper.Stepper(experiment, experiment.stages[0], policy, mesh, jax.random.fold_in(key, SAMPLING))
    return step, fresh(init_params(policy, 1, mesh)), experiment


def final_state(config, out):
    experiment = config_lib.build(config)
    template = stepper.state_template(experiment, transformer(experiment.policy), make_mesh(MeshShape()), 0)
    with Checkpoints(out / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(None, template)
    return jax.tree.leaves(jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key))))


def check_resume(config, folder):
    """Two rollouts and two more are four, bit for bit, in metrics and in the last state, and nothing compiles late."""
    whole, halves = folder / "whole", folder / "halves"
    final = loop.train(config, whole, quiet=True)
    tiny.train_until(2, config, halves)
    with Checkpoints(halves / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 2
    assert loop.train(config, halves, quiet=True, resume=True) == final
    assert (whole / "metrics.jsonl").read_bytes() == (halves / "metrics.jsonl").read_bytes()
    for one, other in zip(final_state(config, whole), final_state(config, halves), strict=True):
        np.testing.assert_array_equal(one, other)
    return whole


def check_refused(config, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.build(config)

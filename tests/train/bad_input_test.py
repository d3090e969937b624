"""Input that cannot be trained on: a clear error before training, or a defined result of the step."""

import dataclasses
import functools

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh

from jentropy import config as config_lib
from jentropy.data import chain_sum
from jentropy.data.task import chain_sum_task
from jentropy.policy.transformer import transformer
from jentropy.rollout.iid import RolloutSpec
from jentropy.train import evaluate, loop, stepper
from jentropy.train import experiment as experiment_lib
from jentropy.train.evaluate import put_prompts
from jentropy.train.metrics import divide, read_metrics
from jentropy.train.programs import make_rollout
from jentropy.train.sharding import AXES, MeshShape, make_mesh, replicated
from jentropy.train.state import new_stage
from jentropy.train.step import make_spec, make_train_step
from jentropy.train.warm_start import init_params

pytestmark = pytest.mark.usefixtures("own_folders")


def no_rows(config, split, data_dir):
    """Splits without rows."""
    return {name: array[:0] for name, array in chain_sum.split_arrays(config, split, data_dir).items()}


def strange_task(kind):
    """Chained addition with something wrong."""
    changes = {
        "empty": {"split_arrays": no_rows},
        "long prompts": {"prompt_columns": 6},
    }
    return dataclasses.replace(chain_sum_task(), **changes[kind])


def train(kind, out):
    config = tiny.tiny()
    config.task = fdl.Config(strange_task, kind)
    config.stages = config.stages[1:2]
    return loop.train(config, out, quiet=True)


def test_an_empty_dataset_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"split 2 .*no example"):
        train("empty", tmp_path / "run")


def test_a_prompt_longer_than_the_bucket_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a prompt of 7 tokens does not fit the bucket of 6 tokens"):
        train("long prompts", tmp_path / "run")


def test_a_group_of_one_has_no_advantage_in_grpo():
    with pytest.raises(config_lib.ConfigError, match=r"stages\.1 \(Reinforce\): num_generations must be at least 2"):
        config_lib.build(config_lib.apply_overrides(tiny.tiny(), ["stages.1.num_generations=1"]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 1), r"eval_batch = 4 rows do not divide over data \* fsdp = 3 shards of the mesh"),
        ((1, 2, 4), None),
        ((4, 1, 2), None),
        ((2, 4, 1), r"eval_batch = 4 rows do not divide over data \* fsdp = 8 shards"),
    ],
)
def test_a_mesh_that_does_not_divide_the_rows_is_an_error(monkeypatch, shape, message):
    experiment = config_lib.build(tiny.tiny())
    monkeypatch.setattr(experiment_lib, "make_mesh", lambda _: AbstractMesh(shape, AXES))
    if message is None:
        experiment.check_mesh()
    else:
        with pytest.raises(ValueError, match=message):
            experiment.check_mesh()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.batch_size=6", r"warm_start.batch_size = 6 rows do not divide over data \* fsdp = 4"),
        ("stages.1.num_prompts=6", r"before.num_prompts = 6 rows"),
        ("stages.2.num_microbatches=4", r"after: a micro-batch = 2 rows"),
    ],
)
def test_the_mesh_is_checked_against_every_stage(monkeypatch, override, message):
    experiment = config_lib.build(config_lib.apply_overrides(tiny.tiny(), [override]))
    monkeypatch.setattr(experiment_lib, "make_mesh", lambda _: AbstractMesh((2, 2, 1), AXES))
    with pytest.raises(ValueError, match=message):
        experiment.check_mesh()


def test_a_rollout_without_any_reward_is_trained_on_as_nothing(tmp_path, monkeypatch):
    def abstain(reward, prompts, completions, fields):
        return np.zeros(len(completions), np.float32), np.zeros(len(completions), bool)

    monkeypatch.setattr(evaluate, "grade_text", abstain)
    tiny.train_until(3, config_lib.apply_overrides(tiny.tiny(), ["task.reward=text"]), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "actor/entropy" in line]
    assert len(lines) == 3
    for line in lines:
        assert "critic/score/mean" not in line and line["actor/grad_norm"] == 0.0


@functools.cache
def rollout():
    """The experiment, its first stage's step, and what one rollout of new parameters gave."""
    experiment, mesh = config_lib.build(tiny.tiny()), make_mesh(MeshShape())
    policy, stage, task = transformer(experiment.policy), experiment.stages[1], experiment.task
    spec = RolloutSpec(
        stage.num_generations, task.max_new_tokens, task.tokenizer.eos_id, task.tokenizer.pad_id, 1.0, task.rewards
    )
    prompts = task.prompts("train", stage.mixture).batch(0, 0, stage.num_prompts)
    sampler = make_rollout(policy, spec, mesh)
    key, index = jax.device_put((jax.random.key(0), np.int32(0)), replicated(mesh))
    rows, _ = sampler(init_params(policy, 0, mesh), key, index, *put_prompts(prompts, mesh))
    settings = {name: getattr(stage, name) for name in ("num_minibatches", "num_epochs", "num_microbatches")}
    step = make_train_step(make_spec(policy, stage.objective, stage.optimizer, **settings), stage.num_prompts, mesh)
    return experiment, policy, mesh, step, rows


def step_on(**changes):
    """Parameters before and after one step on the rollout with `changes`, and the step's metrics."""
    experiment, policy, mesh, step, rows = rollout()
    stage = experiment.stages[1]
    state = new_stage(
        init_params(policy, 0, mesh), jnp.int32(0), jax.random.key(0), stage.objective, stage.optimizer, False
    )
    layout = jax.tree.map(lambda leaf: leaf.sharding, stepper.state_template(experiment, policy, mesh, 1))
    before, state = jax.tree.map(np.array, state.params), jax.device_put(state, layout)
    changes = {name: jax.device_put(value, getattr(rows, name).sharding) for name, value in changes.items()}
    after, metrics = step(state, rows.replace(**changes))
    return before, jax.tree.map(np.array, after.params), divide(metrics)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def differs(one, other):
    return any((a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def some_rewards():
    rows = rollout()[-1]
    return (jnp.arange(rows.rewards.size, dtype=jnp.float32) % 3.0).reshape(rows.rewards.shape)


def test_a_row_without_a_response_token_counts_as_no_token():
    rows = rollout()[-1]
    mask = rows.loss_mask.at[3].set(False)
    before, after, metrics = step_on(loss_mask=mask, rewards=some_rewards())
    assert differs(before, after) and metrics["update/skipped"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["response_length/min"] == 0.0
    garbage = jnp.where(mask, rows.logp_sampler, jnp.nan)
    _, other, others = step_on(loss_mask=mask, rewards=some_rewards(), logp_sampler=garbage, logp_old=garbage)
    assert_equal(after, other)
    assert metrics == others


def test_no_response_token_at_all_skips_every_update():
    rows = rollout()[-1]
    before, after, metrics = step_on(loss_mask=jnp.zeros_like(rows.loss_mask), rewards=some_rewards())
    assert_equal(before, after)
    assert metrics["update/skipped"] == 1.0
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_equal_rewards_give_a_gradient_of_zero_and_no_nan(reward):
    before, after, metrics = step_on(rewards=jnp.full_like(rollout()[-1].rewards, reward))
    assert metrics["actor/grad_norm"] == 0.0 and metrics["update/skipped"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())
    assert_equal(before, after)


def test_a_reward_that_is_not_finite_skips_the_updates_that_hold_it():
    _, after, metrics = step_on(rewards=some_rewards().at[0, 0].set(jnp.nan))
    assert metrics["update/skipped"] > 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))

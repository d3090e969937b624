"""Runs with all parts of DAPO: dynamic sampling, overlong filtering and shaping, in the tiny experiment."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dapo_worker import measure
from poison import poison

from jentropy import config as config_lib
from jentropy import embedded
from jentropy.advantages.reinforce import reinforce
from jentropy.data.task import chain_sum_task
from jentropy.policy.transformer import transformer
from jentropy.rewards.base import TextReward
from jentropy.rewards.shaping import overlong_reward
from jentropy.rollout.dynamic import DynamicSampling, ExhaustedError
from jentropy.rollout.iid import RolloutSpec
from jentropy.train import loop, stepper
from jentropy.train.checkpoint import Checkpoints
from jentropy.train.evaluate import grade_on_host, put_prompts
from jentropy.train.metrics import read_metrics
from jentropy.train.programs import SAMPLING, make_rollout
from jentropy.train.quarantine import SKIPPED
from jentropy.train.replay import replay
from jentropy.train.sharding import MeshShape, make_mesh, replicated
from jentropy.train.signals import PreemptedError
from jentropy.train.warm_start import init_params

pytestmark = pytest.mark.usefixtures("own_folders")

LAST = tiny.BEFORE + tiny.AFTER - 1
GROUPS = SIZE = 4


def tiny_with(**fields):
    """The tiny experiment with these fields in both stages of reinforcement learning."""
    config = tiny.tiny()
    for stage in config.stages[1:]:
        for name, value in fields.items():
            setattr(stage, name, value)
    return config


def dapo():
    """All of it, and in the last rollout a loss that is not finite."""
    config = tiny_with(
        dynamic_sampling=fdl.Config(DynamicSampling, metric="chain_sum", max_num_gen_batches=60),
        mask_truncated=True,
        shaping=(fdl.Config(overlong_reward, max_length=7, overlong_buffer_length=4, overlong_buffer_penalty=0.5),),
    )
    for stage, strike in zip(config.stages[1:], (-1, LAST)):
        stage.objective = embedded.objective({"poison": fdl.Config(poison, step=strike, where="loss")})
    return config


def train(config, out, **options):
    return loop.train(config, out, quiet=True, **options)


def rollout_lines(out):
    return [line for line in read_metrics(out / "metrics.jsonl") if SKIPPED in line]


def metrics_bytes(out):
    return (out / "metrics.jsonl").read_bytes()


def final_state(out):
    experiment = config_lib.build(dapo())
    template = stepper.state_template(experiment, transformer(experiment.policy), make_mesh(MeshShape()), 2)
    with Checkpoints(out / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(None, template)
    return jax.tree.leaves(jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key))))


@pytest.fixture(scope="module")
def finished(own_folders, tmp_path_factory):
    """An uninterrupted run: its folder and what `train` returned."""
    out = tmp_path_factory.mktemp("dapo") / "run"
    return out, train(dapo(), out)


@pytest.fixture(scope="module")
def plain(own_folders, tmp_path_factory):
    """Two rollouts of the tiny experiment as it is, and the evaluation before them."""
    out = tmp_path_factory.mktemp("plain") / "run"
    tiny.train_until(3, tiny.tiny(), out)
    return read_metrics(out / "metrics.jsonl")


def test_every_group_of_every_rollout_varies(finished):
    lines = rollout_lines(finished[0])
    assert len(lines) == LAST + 1
    for line in lines:
        assert 0 < line["rewards/0/mean"] < 1 and line["dynamic/padded_fraction"] == 0
        assert line["dynamic/num_gen_prompts"] == GROUPS * line["dynamic/rounds"]
        assert line["dynamic/kept_fraction"] * line["dynamic/num_gen_prompts"] >= GROUPS - 1e-6
        assert line["dynamic/score/mean"] < line["rewards/0/mean"]
        total = line["rewards/0/mean"] + line["rewards/1/mean"]
        assert line["critic/score/mean"] == pytest.approx(total) == pytest.approx(line["critic/rewards/mean"])
    assert max(line["dynamic/rounds"] for line in lines) > 3


def test_some_rows_are_masked_and_keep_their_lengths(finished):
    lines = rollout_lines(finished[0])
    assert 0 < max(line["overlong/masked_fraction"] for line in lines) < 1
    for line in lines:
        assert (line["response_length/max"] == 7) or line["overlong/masked_fraction"] == 0
        assert line["response_length/min"] >= 1


def test_long_responses_are_punished_in_training_and_not_in_evaluation(finished, plain):
    lines = read_metrics(finished[0] / "metrics.jsonl")
    assert all(-0.5 <= line["rewards/1/mean"] < 0 for line in lines if SKIPPED in line)
    assert lines[0] == plain[0] and "val/entropy" in plain[0]


def test_nothing_compiles_after_the_warm_up_however_many_rounds_there_are(finished):
    counts = {line["step"]: line["compilations"] for line in read_metrics(finished[0] / "timing.jsonl")}
    for stage in (range(1, tiny.BEFORE), range(tiny.BEFORE + 1, LAST + 1)):
        assert len({counts[step] for step in stage}) == 1
    rounds = [line["dynamic/rounds"] for line in rollout_lines(finished[0])]
    assert max(rounds[2 : tiny.BEFORE]) > 1


def calls_before(out, step):
    """How often the sampler is called before a rollout."""
    return int(sum(line["dynamic/rounds"] for line in rollout_lines(out) if line["step"] < step))


@pytest.mark.parametrize(("step", "draw", "resumed_at"), [(1, 0, None), (4, 1, 3), (7, 2, 5)])
def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, step, draw, resumed_at):
    """Wherever it was interrupted: between rollouts, or between the rounds of one."""
    out = tmp_path / "run"
    assert rollout_lines(finished[0])[step]["dynamic/rounds"] > draw
    tiny.train_until(calls_before(finished[0], step) + draw, dapo(), out)
    with Checkpoints(out / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == resumed_at
    assert train(dapo(), out, resume=True) == finished[1]
    assert metrics_bytes(out) == metrics_bytes(finished[0])
    for one, other in zip(final_state(out), final_state(finished[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_signal_between_rounds_commits_a_checkpoint_after_the_rollout(finished, tmp_path, monkeypatch):
    out, real = tmp_path / "run", stepper.grade_on_host
    calls = iter(range(10_000))

    def grade_on_host(task, rows, prompts):
        if next(calls) == calls_before(finished[0], 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(task, rows, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(stepper, "grade_on_host", grade_on_host)
        with pytest.raises(PreemptedError, match="SIGTERM: stopped after 4 rollouts with a checkpoint"):
            train(dapo(), out)
    assert train(dapo(), out, resume=True) == finished[1]
    assert metrics_bytes(out) == metrics_bytes(finished[0])


def test_a_quarantined_rollout_is_replayed_bit_by_bit(finished):
    assert rollout_lines(finished[0])[-1][SKIPPED] == 1
    found = replay(finished[0], LAST, dapo())
    assert (found.start, found.departed, found.recorded, found.skipped) == (8, None, 1.0, 1.0)
    assert replay(finished[0], LAST, dapo()).text().endswith("and every metric is the one the run wrote")


def test_without_a_group_to_drop_it_is_the_plain_run(plain, tmp_path, monkeypatch):
    """The first round samples what a run without dynamic sampling does."""

    def make_judge(column, num_groups, mesh):
        return lambda rows: (np.ones(num_groups, bool), np.float32(0), np.float32(1))

    monkeypatch.setattr(stepper, "make_judge", make_judge)
    out = tmp_path / "run"
    tiny.train_until(3, tiny_with(dynamic_sampling=fdl.Config(DynamicSampling)), out)
    lines = read_metrics(out / "metrics.jsonl")
    assert all(line["dynamic/rounds"] == 1 for line in lines if SKIPPED in line)
    for line in lines:
        for name in [name for name in line if name.startswith("dynamic/")]:
            del line[name]
    assert lines == plain


def make_stepper(config, index=1):
    """The stepper of a stage, and a state to step from, laid out as in a run."""
    experiment = config_lib.build(config)
    stage, policy, mesh = experiment.stages[index], transformer(experiment.policy), make_mesh(MeshShape())
    key, zero = jax.device_put((jax.random.key(experiment.seed), np.int32(0)), replicated(mesh))
    shardings = jax.tree.map(lambda x: x.sharding, stepper.state_template(experiment, policy, mesh, index))
    fresh = jax.jit(lambda params: stepper.fresh_state(experiment, index, params, zero, key), out_shardings=shardings)
    step = stepper.Stepper(experiment, stage, policy, mesh, jax.random.fold_in(key, SAMPLING))
    return step, fresh(init_params(policy, 1, mesh)), experiment


def test_the_batch_names_the_prompts_that_were_kept():
    step, state, experiment = make_stepper(dapo())
    _, metrics, batch = step(state, 0)
    arrays = experiment.task.prompts("train", experiment.stages[1].mixture)._mixture.arrays
    rows = jax.tree.map(np.asarray, batch.rollouts)
    assert float(metrics["dynamic/rounds"][0]) > 1
    np.testing.assert_array_equal(rows.tokens[::SIZE, :7], arrays["prompt"][batch.example_id])
    digits = arrays["prompt"][np.repeat(batch.example_id, SIZE)]
    answer = arrays["answer"][np.repeat(batch.example_id, SIZE)]
    np.testing.assert_array_equal((digits * (digits < 10)).sum(axis=1) % 10, answer)
    accuracy = rows.rewards[:, 0].reshape(GROUPS, SIZE)
    assert (accuracy.max(axis=1) > accuracy.min(axis=1)).all()
    np.testing.assert_array_equal(rows.row_id, np.arange(GROUPS * SIZE))
    np.testing.assert_array_equal(rows.group, np.arange(GROUPS * SIZE) // SIZE)
    np.testing.assert_array_equal(rows.loss_mask.any(axis=1), ~rows.row_data["truncated"])


def test_rounds_differ_in_prompts_and_in_samples():
    """Of one prompt as well: the second round answers it anew."""
    step, state, _ = make_stepper(tiny_with(dynamic_sampling=fdl.Config(DynamicSampling, max_num_gen_batches=3)))
    prompts = [step._source.batch(0, 5, GROUPS, draw) for draw in range(3)]
    assert len({tuple(p.example_id) for p in prompts}) == 3
    np.testing.assert_array_equal(prompts[0].tokens, step._source.batch(0, 5, GROUPS).tokens)
    tokens = [np.asarray(step._round(state, 5, draw, prompts[0]).tokens) for draw in (0, 1, 2, 1)]
    assert (tokens[0] != tokens[1]).any() and (tokens[1] != tokens[2]).any()
    np.testing.assert_array_equal(tokens[1], tokens[3])


def test_too_few_groups_are_an_error_that_names_the_numbers(tmp_path):
    config = tiny_with(dynamic_sampling=fdl.Config(DynamicSampling, max_num_gen_batches=1))
    with pytest.raises(
        ExhaustedError, match=r"in 1 rounds of 4 prompts the responses of only [0-3] differ in reward 0"
    ):
        train(config, tmp_path / "run")


def test_padding_costs_no_update_that_has_a_group_and_moves_nothing():
    """One round, in which one or two groups vary: updates of padding alone leave the state as it is."""
    padded = tiny_with(dynamic_sampling=fdl.Config(DynamicSampling, max_num_gen_batches=1, on_exhausted="pad"))
    step, state, _ = make_stepper(padded)
    shares, counts = [], []
    for number in range(6):
        before = jax.tree.map(np.array, state.params)
        state, metrics, batch = step(state, number)
        shares.append(float(metrics["dynamic/padded_fraction"][0]) / GROUPS)
        assert metrics[SKIPPED] == (0.0, 4.0)
        real = np.asarray(batch.rollouts.row_data["is_valid"]).reshape(GROUPS, SIZE).all(axis=1)
        assert real.sum() == round(GROUPS * (1 - shares[-1]))
        counts.append(float(metrics["actor/loss"][1]))
        same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params))]
        assert all(same) == (shares[-1] == 1.0)
    assert 1.0 in shares and any(0 < share < 1 for share in shares)
    assert all((count == 0) == (share == 1.0) for count, share in zip(counts, shares))


def test_a_run_of_padding_alone_goes_on(tmp_path):
    """No gradient, no quarantine, and no end; rollouts without a token have no entropy to report."""
    config = tiny_with(dynamic_sampling=fdl.Config(DynamicSampling, max_num_gen_batches=1, on_exhausted="pad"))
    train(config, tmp_path / "run")
    lines = rollout_lines(tmp_path / "run")
    assert len(lines) == LAST + 1 and all(line[SKIPPED] == 0 for line in lines)
    empty = [line for line in lines if line["dynamic/padded_fraction"] == 1]
    assert 0 < len(empty) < len(lines)
    for line in lines:
        assert ("actor/entropy" in line) == ("response_length/mean" in line) == (line not in empty)
        assert line in empty or line["response_length/min"] >= 1
    tokens = [line["tokens"] for line in read_metrics(tmp_path / "run" / "timing.jsonl")]
    for line, found in zip(lines, tokens, strict=True):
        rows = GROUPS * SIZE * (1 - line["dynamic/padded_fraction"])
        assert found == pytest.approx(rows * line.get("response_length/mean", 0))
    assert not (tmp_path / "run" / "quarantine").exists()


def test_a_shaping_reward_makes_no_row_valid():
    """Rows that the task's only grader abstains from stay out, as they do without shaping."""
    task = chain_sum_task()

    def grade(prompts, completions, **fields):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    task = dataclasses.replace(task, rewards=(TextReward("half", grade),))
    shaping = overlong_reward(max_length=7, overlong_buffer_length=4)
    policy, mesh = transformer(config_lib.build(tiny.tiny()).policy), make_mesh(MeshShape())
    prompts = task.prompts("train", {2: 1.0}).batch(0, 0, GROUPS)
    spec = RolloutSpec(SIZE, 7, task.tokenizer.eos_id, task.tokenizer.pad_id, 1.0, (*task.rewards, shaping))
    params = jax.jit(policy.init)(jax.random.key(0))
    rows, _ = make_rollout(policy, spec, mesh)(params, jax.random.key(0), jnp.int32(0), *put_prompts(prompts, mesh))
    rows = grade_on_host(task, rows, prompts)
    np.testing.assert_array_equal(rows.row_data["is_valid"], np.arange(GROUPS * SIZE) % 2 == 0)
    length = np.asarray(rows.loss_mask).sum(axis=1)
    np.testing.assert_allclose(rows.rewards[:, 1], np.minimum(3 - length, 0) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_generations": 1, "dynamic_sampling": fdl.Config(DynamicSampling)},
            "num_generations must be at least 2 .*got 1",
        ),
        (
            {"dynamic_sampling": fdl.Config(DynamicSampling, metric="overlong")},
            r"metric must be one of the rewards \['chain_sum'\], given once, got 'overlong'",
        ),
        (
            {"dynamic_sampling": fdl.Config(DynamicSampling, max_num_gen_batches=0)},
            "max_num_gen_batches must be at least 1, got 0",
        ),
    ],
)
def test_what_cannot_work_is_an_error_when_it_is_built(fields, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.build(tiny_with(shaping=dapo().stages[1].shaping, **fields))


def test_a_group_of_one_is_an_error_whatever_the_estimator():
    objective = embedded.objective(estimator=fdl.Config(reinforce))
    with pytest.raises(config_lib.ConfigError, match="num_generations must be at least 2 for dynamic_sampling, got 1"):
        config_lib.build(
            tiny_with(objective=objective, num_generations=1, dynamic_sampling=fdl.Config(DynamicSampling))
        )


def test_eight_devices_keep_the_groups_that_one_keeps(tmp_path):
    """A process of its own, since the number of devices is fixed when jax starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    worker = pathlib.Path(__file__).parents[1] / "dapo_worker.py"
    command = [sys.executable, str(worker), str(tmp_path / "found.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found, wanted = json.loads((tmp_path / "found.json").read_text()), measure(num_steps=1)
    assert found["devices"] == 8 and found["compilations"] == 0
    assert max(found["rounds"]) > 1
    assert found["example_id"] == wanted["example_id"] and found["rounds"][0] == wanted["rounds"][0]
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5, atol=1e-6)


def test_weights_are_those_of_all_columns():
    """A grader that weighs .5, and a shaping reward after it."""
    experiment = config_lib.build(dapo())
    stage = experiment.stages[1]
    assert experiment.reward_weights(stage) is None
    half = dataclasses.replace(experiment.task.rewards[0], weight=0.5)
    weighted = dataclasses.replace(experiment, task=dataclasses.replace(experiment.task, rewards=(half,)))
    assert weighted.reward_weights(stage) == (0.5, 1.0)
    template = stepper.state_template(weighted, transformer(experiment.policy), make_mesh(MeshShape()), 1)
    assert template.estimator_state.reward_weights.shape == (2,)

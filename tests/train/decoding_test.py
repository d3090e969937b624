"""Samplers inside a run, the end token, and what rows hold where a method requires it."""

import dataclasses
import functools
from types import SimpleNamespace

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jentropy import config as config_lib
from jentropy.advantages.remax import remax
from jentropy.policy.transformer import transformer
from jentropy.rewards.base import DeviceReward, TextReward
from jentropy.rollout.iid import RolloutSpec
from jentropy.samplers import combine, e3_temperature, entropy_temperature, plain, top_k, top_p
from jentropy.train import loop, step, stepper
from jentropy.train.checkpoint import Checkpoints
from jentropy.train.evaluate import put_prompts, total_reward
from jentropy.train.metrics import divide, read_metrics
from jentropy.train.programs import make_rollout
from jentropy.train.sharding import MeshShape, make_mesh, replicated
from jentropy.train.state import new_stage
from jentropy.train.warm_start import init_params

pytestmark = pytest.mark.usefixtures("own_folders")

E3 = fdl.Config(combine, e3=fdl.Config(e3_temperature, vocab_size=16, num_steps=5), top_p=fdl.Config(top_p, p=0.95))


def sampled(sampler):
    """The tiny experiment with a sampler in both stages of reinforcement learning."""
    config = tiny.tiny()
    for stage in config.stages[1:]:
        stage.sampler = sampler
    return config


def train(config, out, **options):
    return loop.train(config, out, quiet=True, **options)


def steps_of(out):
    """The metrics of the rollouts of a run."""
    return [line for line in read_metrics(out / "metrics.jsonl") if "actor/entropy" in line]


def final_state(config, out):
    """The newest checkpoint, as NumPy arrays."""
    experiment = config_lib.build(config)
    mesh = make_mesh(MeshShape())
    template = stepper.state_template(experiment, transformer(experiment.policy), mesh, len(experiment.stages) - 1)
    with Checkpoints(out / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(None, template)
    return jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))


@pytest.fixture(scope="module")
def finished(own_folders, tmp_path_factory):
    """An uninterrupted run with E3's temperature and top-p: its folder and what `train` returned."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, train(sampled(E3), out)


def test_the_temperature_follows_the_entropy_and_starts_anew_with_a_stage(finished):
    lines = steps_of(finished[0])
    for stage in ("before", "after"):
        part = [line for line in lines if line["stage"] == stage]
        entropy = [line["actor/entropy"] for line in part]
        temperature = [1.0, 1.0]
        for measured in entropy[1:-1]:
            factor = 1 + temperature[-1] * np.log(entropy[0] / measured) / (np.log(16) + np.log(np.log(16)))
            temperature.append(float(np.clip(temperature[-1] * factor, 0.5, 2.0)))
        found = [line["sampler/temperature"] for line in part]
        # Annealing, of the last two of five rollouts, has not begun before the fifth.
        np.testing.assert_allclose(found[:4], temperature[:4], rtol=1e-4)
        assert len(set(found)) > 2


def test_sampler_and_trainer_agree_at_every_temperature(finished):
    assert max(line["sampler/logp_diff_max"] for line in steps_of(finished[0])) < 2e-5


@pytest.mark.parametrize(("stop", "resumed_at"), [(4, 3), (8, 8)])
def test_a_resumed_run_has_the_same_temperatures_bit_by_bit(finished, tmp_path, stop, resumed_at):
    config, out = sampled(E3), tmp_path / "run"
    tiny.train_until(stop, config, out)
    with Checkpoints(out / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == resumed_at
    assert train(config, out, resume=True) == finished[1]
    assert (out / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()
    one, other = final_state(config, out), final_state(config, finished[0])
    assert int(one.decode_state["e3"].step) == tiny.AFTER
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_plain_sampler_is_none(tmp_path):
    for name, config in {"none": tiny.tiny(), "plain": sampled(fdl.Config(plain))}.items():
        tiny.train_until(2, config, tmp_path / name)
    written = (tmp_path / "plain" / "metrics.jsonl").read_bytes()
    assert written and written == (tmp_path / "none" / "metrics.jsonl").read_bytes()
    assert "sampler/temperature" not in steps_of(tmp_path / "none")[0]


def test_settings_of_a_sampler_share_a_program():
    experiment = config_lib.build(tiny.tiny())
    policy, mesh = transformer(experiment.policy), make_mesh(MeshShape())
    spec = RolloutSpec(2, 3, 15, 10, 1.0, experiment.task.rewards)
    programs = [make_rollout(policy, spec._replace(sampler=top_k(k=k)), mesh) for k in (1, 5)]
    assert programs[0] is programs[1] is not make_rollout(policy, spec, mesh)
    kl = spec._replace(required=frozenset({"ref_log_prob"}))
    assert make_rollout(policy, kl, mesh) is make_rollout(policy, spec, mesh)


def test_a_sampler_does_not_advance_on_numbers_that_are_not_finite():
    sampler = e3_temperature(vocab_size=16)
    spec = SimpleNamespace(advance=sampler.advance, temperature=1.0)
    state = SimpleNamespace(decode_state=sampler.init())
    mask = jnp.ones((2, 3), bool)
    for rows, entropy in ((mask, jnp.nan), (mask, jnp.inf), (~mask, 0.5)):
        scores = {"entropy": jnp.full(mask.shape, entropy)}
        after = step._advanced(spec, state, SimpleNamespace(loss_mask=rows), scores)
        jax.tree.map(np.testing.assert_array_equal, after, state.decode_state)
    after = step._advanced(spec, state, SimpleNamespace(loss_mask=mask), {"entropy": jnp.full(mask.shape, 0.5)})
    assert int(after.step) == 1


# What rows hold.


def low_tokens(tokens, mask, fields):
    """The share of digits below 5 in the response."""
    del fields
    low = jnp.sum(mask & (tokens < 5), axis=1, dtype=jnp.float32)
    return low / jnp.sum(mask, axis=1, dtype=jnp.float32)


def low_text(prompts, completions, **fields):
    """The same of texts."""
    del prompts, fields
    return [sum(c in "01234" for c in completion) / len(completion) for completion in completions]


DEVICE, TEXT = DeviceReward("low", low_tokens), TextReward("low", low_text)


def digit_before_the_end(completion):
    before, end, _ = completion.partition("|")
    return before[-1:] if end and before[-1:].isdigit() else ""


def small_task(*rewards, **changes):
    """The task with other graders: a new policy is never right."""
    return dataclasses.replace(config_lib.build(tiny.tiny()).task, rewards=rewards or (DEVICE,), **changes)


def changed(task=None, **changes):
    """The tiny experiment with one stage of reinforcement learning, whose fields are changed."""
    experiment = config_lib.build(tiny.tiny())
    stage = dataclasses.replace(experiment.stages[1], **changes)
    return dataclasses.replace(experiment, stages=(stage,), task=task or small_task())


def requiring(*names):
    """A method that requires these."""
    objective = config_lib.build(tiny.tiny()).stages[1].objective
    return objective._replace(estimator=remax()._replace(requires=names))


@functools.cache
def policy_and_params():
    experiment = config_lib.build(tiny.tiny())
    policy, mesh = transformer(experiment.policy), make_mesh(MeshShape())
    return policy, init_params(policy, 3, mesh)


def one_step(experiment):
    """The rollout of one step, and the step's metrics."""
    (policy, params), mesh, stage = policy_and_params(), make_mesh(MeshShape()), experiment.stages[0]
    key, start = jax.device_put((jax.random.key(0), np.int32(0)), replicated(mesh))
    shardings = jax.tree.map(lambda x: x.sharding, stepper.state_template(experiment, policy, mesh, 0))
    parts = {"objective": stage.objective, "optimizer": stage.optimizer, "reference": False, "sampler": stage.sampler}
    state = jax.jit(functools.partial(new_stage, **parts), out_shardings=shardings)(params, start, key)
    _, metrics, batch = stepper.Stepper(experiment, stage, policy, mesh, key)(state, 0)
    return jax.device_get(batch.rollouts), divide(jax.device_get(metrics))


@pytest.fixture(scope="module")
def both(own_folders):
    """Rows that hold answers and greedy rewards, of a task on the device, and their metrics."""
    return one_step(changed(objective=requiring("answer_id", "greedy_reward")))


def test_rows_hold_the_answers_of_their_responses(both):
    rows = both[0]
    text = config_lib.build(tiny.tiny()).task.tokenizer.decode_rows(rows.tokens, rows.loss_mask)
    found = [digit_before_the_end(completion) for completion in text]
    np.testing.assert_array_equal(rows.row_data["answer_id"], [int(digit or -1) for digit in found])
    assert len(set(found)) > 1


def test_the_greedy_reward_is_that_of_a_greedy_response(both):
    stage, mesh = changed().stages[0], make_mesh(MeshShape())
    task, (policy, params) = small_task(), policy_and_params()
    spec = RolloutSpec(1, task.max_new_tokens, task.tokenizer.eos_id, task.tokenizer.pad_id, 1.0, task.rewards, True)
    prompts = task.prompts("train", stage.mixture).batch(0, 0, stage.num_prompts)
    key, index = jax.device_put((jax.random.key(9), np.int32(0)), replicated(mesh))
    greedy, _ = make_rollout(policy, spec, mesh)(params, key, index, *put_prompts(prompts, mesh))
    wanted = np.repeat(total_reward(task, np.asarray(greedy.rewards)), stage.num_generations)
    np.testing.assert_array_equal(both[0].row_data["greedy_reward"], wanted)
    assert len(set(wanted.tolist())) > 1
    np.testing.assert_allclose(both[1]["critic/greedy_rewards/mean"], wanted.mean(), rtol=1e-6)


def test_texts_give_what_the_device_gives(both):
    task = small_task(TEXT, answer_id=None, final_answer=digit_before_the_end)
    rows, metrics = one_step(changed(task, objective=requiring("answer_id", "greedy_reward")))
    device = both[0]
    assert set(rows.token_data) == set(device.token_data) == set()
    for name in ("greedy_reward", "is_valid", "truncated"):
        np.testing.assert_array_equal(rows.row_data[name], device.row_data[name])
    ids, wanted = rows.row_data["answer_id"], device.row_data["answer_id"]
    np.testing.assert_array_equal(ids[:, None] == ids[None, :], wanted[:, None] == wanted[None, :])
    np.testing.assert_array_equal(ids == -1, wanted == -1)
    assert metrics == both[1]


def test_greedy_rewards_are_weighted_and_may_come_from_host_and_device(both):
    always = TextReward("always", lambda prompts, completions, **fields: [1.0] * len(completions), weight=0.25)
    task = small_task(dataclasses.replace(DEVICE, weight=2.0), dataclasses.replace(TEXT, weight=3.0), always)
    objective = requiring("greedy_reward")
    rows, _ = one_step(changed(task, objective=objective))
    wanted = 5.0 * both[0].row_data["greedy_reward"] + 0.25
    np.testing.assert_allclose(rows.row_data["greedy_reward"], wanted, rtol=1e-6)
    assert rows.rewards.shape == (16, 3) and "answer_id" not in rows.row_data


def test_a_grader_that_abstains_is_known_row_by_row():
    def even(prompts, completions, **fields):
        return [1.0 if len(completion) % 2 == 0 else None for completion in completions]

    rows, _ = one_step(changed(small_task(DEVICE, TextReward("even", even))))
    assert rows.row_data["is_valid"].all()
    length = rows.loss_mask.sum(axis=1)
    wanted = np.stack([np.ones(16, bool), length % 2 == 0], axis=1)
    np.testing.assert_array_equal(rows.row_data["reward_is_valid"], wanted)
    np.testing.assert_array_equal(rows.rewards[:, 1], wanted[:, 1])
    assert 0 < wanted[:, 1].sum() < 16


def test_nothing_is_made_that_is_not_required():
    rows, _ = one_step(changed())
    assert set(rows.row_data) == {"is_valid", "truncated"} and not rows.token_data


def test_rows_hold_the_temperatures_of_their_tokens():
    rows, metrics = one_step(changed(sampler=entropy_temperature(high=1.4, low=0.8, threshold=2.0)))
    temperature = rows.token_data["temperature"]
    assert set(np.unique(temperature[rows.loss_mask]).tolist()) == {float(np.float32(0.8)), float(np.float32(1.4))}
    assert np.all(temperature[~rows.loss_mask] == 1.0)
    np.testing.assert_allclose(metrics["sampler/temperature"], temperature[rows.loss_mask].mean(), rtol=1e-6)
    assert metrics["sampler/logp_diff_max"] < 1e-5


def test_the_end_token_may_be_left_out_of_the_loss():
    (rows, whole), (again, metrics) = one_step(changed()), one_step(changed(eos_in_loss=False))
    jax.tree.map(np.testing.assert_array_equal, rows, again)
    ended = ~rows.row_data["truncated"]
    lengths = rows.loss_mask.sum(axis=1) - ended
    np.testing.assert_allclose(metrics["response_length/mean"], lengths.mean(), rtol=1e-6)
    np.testing.assert_allclose(whole["response_length/mean"], rows.loss_mask.sum(axis=1).mean(), rtol=1e-6)
    assert ended.any() and metrics["actor/grad_norm"] != whole["actor/grad_norm"] > 0.0
    assert metrics["critic/score/mean"] == whole["critic/score/mean"]


def test_what_no_row_can_hold_is_refused():
    message = "a method needs taste, and rows can hold only ref_log_prob, answer_id, greedy_reward, truncated, is_valid"
    with pytest.raises(ValueError, match=message):
        changed(objective=requiring("is_valid", "taste"))


def test_a_task_without_answers_is_refused():
    message = "stage 'before' needs answer_id, and task 'chain_sum' does not say what the answer of a response is"
    with pytest.raises(ValueError, match=message):
        changed(small_task(answer_id=None), objective=requiring("answer_id"))

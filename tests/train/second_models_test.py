"""Second models in training: what they learn, resumed runs, one compiled step for all learning rates."""

import dataclasses

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jentropy import config as config_lib
from jentropy import head
from jentropy.advantages.gae import gae
from jentropy.advantages.prime import prime
from jentropy.policy.transformer import TransformerConfig, transformer
from jentropy.train import loop
from jentropy.train.metrics import read_metrics
from jentropy.train.optimizer import AdamW
from jentropy.train.second_models import Critic, ImplicitReward
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.stepper import make_learners, stage_spec, state_template

POLICY = transformer(
    TransformerConfig(vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=8, mlp_width=16)
)


def with_models() -> fdl.Config:
    """The tiny experiment: PPO with a critic, then PRIME whose model is updated first."""
    config = tiny.tiny()
    before, after = config.stages[1:]
    before.objective.estimator = fdl.Config(gae, lam=0.9)
    before.learners = {"critic": fdl.Config(Critic, optimizer=fdl.Config(AdamW, learning_rate=3e-3))}
    after.objective.estimator = fdl.Config(prime)
    after.learners = {"prm": fdl.Config(ImplicitReward, update_first=True)}
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with tiny.own_folders(tmp_path_factory.getbasetemp()):
        out = tmp_path_factory.mktemp("models") / "run"
        loop.train(with_models(), out, quiet=True)
        yield out


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 7), 0, 16, jnp.int32)


def test_a_value_knows_the_tokens_before_it_and_no_other(tokens):
    params = POLICY.init(jax.random.key(0))
    learner = Critic().make(POLICY)
    state = learner.init(jax.random.key(0), params)
    model, hidden = jax.jit(learner.annotate.value.__call__), jax.jit(POLICY.hidden)
    assert not np.asarray(model(state.params, tokens)).any(), "the head begins with zeros"
    state = state._replace(params=state.params | {"head": jnp.ones(16)})
    value = np.asarray(model(state.params, tokens))
    np.testing.assert_allclose(value[:, 1:], np.asarray(hidden(params, tokens)).sum(-1)[:, :-1], rtol=1e-5)
    changed = np.asarray(model(state.params, tokens.at[:, 4].add(1) % 16))
    np.testing.assert_array_equal(changed[:, :5], value[:, :5])
    assert (changed[:, 5] != value[:, 5]).all() and not value[:, 0].any()


def test_the_implicit_reward_is_a_log_ratio_of_the_policys_kind(tokens):
    params = POLICY.init(jax.random.key(0))
    learner = ImplicitReward().make(POLICY)
    state = learner.init(jax.random.key(0), params)
    found = np.asarray(learner.annotate.model.log_prob(state.params, tokens))
    scores = head.linear_scores(POLICY.hidden(params, tokens)[:, :-1], POLICY.unembed(params), tokens[:, 1:])
    np.testing.assert_array_equal(found[:, 1:], scores.log_prob)
    assert all(a is not b for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True))


def test_both_models_learn_and_report(run):
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "actor/loss" in line]
    before, after = lines[: tiny.BEFORE], lines[tiny.BEFORE :]
    assert all({"critic/vf_loss", "critic/vf_explained_var"} <= line.keys() for line in before)
    assert all({"reward_model/prm_loss", "prime/process_reward"} <= line.keys() for line in after)
    assert not any("critic/vf_loss" in line for line in after), "second models begin anew with a stage"
    values = [line["critic/values/mean"] for line in before]
    assert values[0] == 0.0 and all(value != 0.0 for value in values[1:])
    assert len({line["reward_model/prm_loss"] for line in after}) == len(after)


@pytest.mark.parametrize("step", [2, 7])
def test_a_run_resumes_with_its_models_bit_for_bit(run, tmp_path, step):
    tiny.train_until(step, with_models(), tmp_path)
    loop.train(with_models(), tmp_path, resume=True, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_learning_rates_share_one_compiled_step_and_models_lie_like_the_policy():
    built = config_lib.build(with_models())
    stage = built.stages[1]
    model = stage.learners["critic"]
    faster = dataclasses.replace(model, optimizer=dataclasses.replace(model.optimizer, learning_rate=1e-2))
    other = dataclasses.replace(stage, learners={"critic": faster})
    assert stage_spec(built, stage, POLICY) == stage_spec(built, other, POLICY)
    slower = dataclasses.replace(model, num_epochs=3)
    assert stage_spec(built, stage, POLICY) != stage_spec(
        built, dataclasses.replace(stage, learners={"critic": slower}), POLICY
    )
    assert make_learners(built, stage)["critic"].init != make_learners(built, other)["critic"].init
    state = state_template(built, POLICY, make_mesh(MeshShape()), 1)
    sharding = jax.tree.map(lambda x: x.sharding, state)
    critic = sharding.learners["critic"]
    assert critic.params["body"] == sharding.params
    assert any(sharding.params == part for part in (critic.opt_state[1].mu["body"], critic.opt_state[1].nu["body"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.1.learners.critic.cliprange_value=0.0", "cliprange_value must be above 0, got 0.0"),
        ("stages.1.learners.critic.num_epochs=0", "num_epochs must be a whole number of at least 1, got 0"),
        ("stages.2.learners.prm.beta=-1.0", "beta must be finite and above 0, got -1.0"),
        ("stages.2.learners.prm.reference=sft", "reference must be initial or policy, got 'sft'"),
    ],
)
def test_bad_numbers_are_named_when_the_config_is_built(change, message):
    with pytest.raises(ValueError, match=message):
        config_lib.build(config_lib.apply_overrides(with_models(), [change]))


def test_an_estimator_without_its_model_and_two_of_one_kind_are_refused():
    config = with_models()
    config.stages[1].learners = {}
    with pytest.raises(ValueError, match=r"a method needs value, .* such as a second model in `learners`"):
        config_lib.build(config)
    config.stages[1].learners = {"a": fdl.Config(Critic), "b": fdl.Config(Critic)}
    with pytest.raises(ValueError, match=r"learners must be such that only one gives value, got \['a', 'b'\]"):
        config_lib.build(config)

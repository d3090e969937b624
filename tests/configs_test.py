"""Every config of experiments/configs: it builds, has one stable text, and its shapes fit."""

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jentropy import config as config_lib
from jentropy import embedded
from jentropy.base import Rollouts
from jentropy.data.preferences import PairBatch
from jentropy.policy.transformer import transformer
from jentropy.rollout.iid import RolloutSpec
from jentropy.samplers import plain
from jentropy.train.experiment import Experiment, Reinforce, Supervised
from jentropy.train.preference_stage import Prefer
from jentropy.train.preference_step import make_preference_step, pair_rollouts, preference_spec
from jentropy.train.programs import make_rollout
from jentropy.train.sharding import MeshShape, make_mesh
from jentropy.train.step import StepSpec, make_train_step
from jentropy.train.stepper import stage_spec, state_template
from jentropy.train.warm_start import warm_start_name

FOLDER = Path(__file__).parent.parent / "experiments" / "configs"
PATHS = sorted(FOLDER.glob("*.py"))
ASKED = {
    "quickstart", "law_grpo", "shift_grpo", "shift_clip_cov", "shift_kl_cov", "shift_entropy_bonus",
    "shift_clip_higher", "smoke",
}  # fmt: skip


def load(name):
    return config_lib.load_config(FOLDER / f"{name}.py")


def experiment(name) -> Experiment:
    return config_lib.build(load(name))


def policy_gradient_stages(built: Experiment) -> list[Reinforce]:
    return [stage for stage in built.stages if isinstance(stage, Reinforce)]


def specs(built: Experiment) -> list[StepSpec]:
    """What is compiled into the step of each stage of reinforcement learning."""
    return [stage_spec(built, stage, transformer(built.policy)) for stage in policy_gradient_stages(built)]


def test_the_configs_that_documents_name_are_there():
    assert ASKED <= {path.stem for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_docstring_says_what_how_and_at_what_cost(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"jentropy train experiments/configs/{path.stem}.py --out runs/{path.stem}\n" in text
    assert "Hardware: " in text and "Cost: " in text
    assert re.search(r"\b\d{4}\.\d{5}\b", text), "names no paper"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_config_is_named_like_its_file(path):
    assert config_lib.load_config(path).name == ("law_grpo" if path.stem == "quickstart" else path.stem)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_config_has_one_text_that_builds_the_same(path, tmp_path):
    config = config_lib.load_config(path)
    (tmp_path / "config.json").write_text(config_lib.dump(config), encoding="utf-8")
    loaded = config_lib.load(tmp_path / "config.json")
    assert config_lib.identity(loaded) == config_lib.identity(config) == config_lib.identity(load(path.stem))
    assert config_lib.flatten(loaded) == config_lib.flatten(config)
    built, again = config_lib.build(config), config_lib.build(loaded)
    assert (built.task, built.policy, built.evaluation) == (again.task, again.policy, again.evaluation)
    assert [stage.optimizer for stage in built.stages] == [stage.optimizer for stage in again.stages]
    assert specs(built) == specs(again)


def grown(stage: Reinforce, num_tokens: int, rows: Rollouts) -> Rollouts:
    """The shapes of what the stage's strategy makes of the shapes of first responses."""
    rows = jax.tree.map(lambda x: x.update(shape=(stage.num_rows, *x.shape[1:])), rows)
    row = jax.ShapeDtypeStruct((stage.num_rows,), np.int32)
    values = row.update(shape=(stage.num_rows, num_tokens + 1), dtype=np.float32)
    known = {
        "prefix_length": row, "exit_order": row, "step_id": row.update(shape=rows.tokens.shape),
        "prefix_value": values, "prefix_known": values.update(dtype=np.bool_),
    }  # fmt: skip
    provides = () if stage.strategy is None else stage.strategy.provides
    return rows.replace(row_data={**rows.row_data, **{name: known[name] for name in provides}})


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_shapes_fit_from_prompts_to_the_next_state(path):
    built, mesh = experiment(path.stem), make_mesh(MeshShape())
    policy, task = transformer(built.policy), built.task
    built.check_mesh()
    key = jax.random.key(0)
    for stage, spec in zip(policy_gradient_stages(built), specs(built), strict=True):
        sampler = RolloutSpec(
            stage.num_generations, task.max_new_tokens, task.tokenizer.eos_id, task.tokenizer.pad_id,
            stage.objective.temperature, task.rewards, sampler=stage.sampler or plain(), required=stage.required,
            answer_id=task.answer_id,
        )  # fmt: skip
        column = jax.ShapeDtypeStruct((stage.num_prompts,), np.int32)
        prompts = jax.ShapeDtypeStruct((stage.num_prompts, task.prompt_columns), np.int32)
        state = state_template(built, policy, mesh, built.stages.index(stage))
        fields = {"answer": column, "num_digits": column}
        rollout = make_rollout(policy, sampler, mesh)
        batch = prompts, column, fields, state.decode_state
        rows, _ = jax.eval_shape(rollout, state.params, key, column.update(shape=()), *batch)
        assert rows.tokens.shape == (256, 14) or stage.strategy is not None
        rows = grown(stage, task.max_new_tokens, rows)
        after, metrics = jax.eval_shape(make_train_step(spec, stage.num_groups, mesh), state, rows)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert all(total.shape == count.shape == () for total, count in metrics.values())


def preference_stages(built: Experiment) -> list[Prefer]:
    return [stage for stage in built.stages if isinstance(stage, Prefer)]


PREFERENCES = ("h_dpo_sharp", "h_dpo_one", "h_dpo_flat")


@pytest.mark.parametrize("name", PREFERENCES)
def test_pairs_fit_from_the_data_to_the_next_state(name):
    built, mesh = experiment(name), make_mesh(MeshShape())
    policy, task = transformer(built.policy), built.task
    (stage,) = preference_stages(built)
    state = state_template(built, policy, mesh, built.stages.index(stage))
    shape, num = (stage.num_rows, task.prompt_columns + task.max_new_tokens), np.int32(0)
    rows = pair_rollouts(
        PairBatch(np.zeros(shape, np.int32), np.zeros(shape, bool), np.full(shape[0], num), np.full(shape[0] // 2, num))
    )
    after, metrics = jax.eval_shape(make_preference_step(preference_spec(stage, policy), mesh), state, rows)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(total.shape == count.shape == () for total, count in metrics.values())
    assert set(stage.mixture) <= set(task.pair_splits)


def test_the_configs_of_h_dpo_differ_in_a_number_only():
    stages = [stage for name in PREFERENCES for stage in preference_stages(experiment(name))]
    assert [float(stage.loss.init().alpha) for stage in stages] == pytest.approx([0.8, 1.0, 1.25])
    policy = transformer(experiment("h_dpo_one").policy)
    assert len({preference_spec(stage, policy) for stage in stages}) == 1
    names = {warm_start_name(load(name), make_mesh(MeshShape())) for name in ("h_dpo_sharp", "h_dpo_one", "law_grpo")}
    assert len(names) == 1, "one warm start, that of LAW"


def test_the_methods_are_the_ones_that_the_names_say():
    def chain(name):
        stage = policy_gradient_stages(experiment(name))[-1]
        return {k: jax.tree.map(float, state) for k, state in stage.objective.mechanisms.init().items()}

    plain = chain("shift_grpo")
    assert plain == chain("law_grpo") and list(plain) == ["clip_range"]
    assert plain["clip_range"] == pytest.approx((0.2, 0.2))
    assert chain("shift_clip_higher")["clip_range"] == pytest.approx((0.2, 0.5))
    assert list(chain("shift_clip_cov")) == ["clip_range", "clip_cov"]
    assert list(chain("shift_kl_cov")) == ["clip_range", "kl_cov"]
    (numerator, denominator), coefficient = chain("shift_kl_cov")["kl_cov"]
    assert (numerator / denominator, coefficient) == pytest.approx((0.1, 1.0))
    assert list(chain("shift_entropy_bonus")) == ["clip_range", "entropy_bonus"]


def test_both_stages_of_a_shift_run_the_same_program():
    for name in ("shift_grpo", "shift_clip_cov", "shift_entropy_bonus"):
        before, after = specs(experiment(name))
        assert before == after


def test_the_shift_configs_of_one_task_share_one_warm_start():
    mesh, names = make_mesh(MeshShape()), {}
    for config in (load(path.stem) for path in PATHS if path.stem.startswith("shift_")):
        names.setdefault(config_lib.build(config.task), set()).add(warm_start_name(config, mesh))
    assert sorted(len(task.rewards) for task in names) == [1, 2]
    assert all(len(found) == 1 for found in names.values())
    assert warm_start_name(load("law_grpo"), mesh) not in set.union(*names.values())


def test_the_quickstart_runs_configs_of_this_folder_with_the_other_methods_switched_off():
    runs, used = embedded.quickstart(), []
    assert list(runs) == ["law_grpo", "shift_grpo", "shift_clip_cov", "shift_entropy_bonus"]
    for name, config in runs.items():
        here, there = set(config_lib.flatten(load(name))), set(config_lib.flatten(config))
        assert here <= there
        assert all(".objective.mechanisms." in line for line in there - here)
        used += specs(config_lib.build(config))
    assert len(set(used)) == 1, "one compiled step serves all runs"
    assert config_lib.identity(load("quickstart")) == config_lib.identity(runs["law_grpo"])


def test_smoke_has_every_kind_of_stage_and_is_small():
    built = experiment("smoke")
    assert [type(stage) for stage in built.stages] == [Supervised, Reinforce, Reinforce]
    assert sum(stage.steps for stage in policy_gradient_stages(built)) == 10

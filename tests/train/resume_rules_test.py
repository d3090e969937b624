"""Every field of every config has a rule, and a resume keeps to it."""

import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path

import fiddle as fdl
import pytest
import tiny

from jentropy import config as config_lib
from jentropy import embedded, surrogates
from jentropy.base import Objective
from jentropy.config import ConfigError
from jentropy.data import task as task_lib
from jentropy.policy.transformer import TransformerConfig
from jentropy.train import resume_rules
from jentropy.train.experiment import Evaluation, Experiment, Reinforce, Supervised
from jentropy.train.optimizer import AdamW
from jentropy.train.preference_stage import Prefer
from jentropy.train.resume_rules import Rule, check_resume, classify, find_changes
from jentropy.train.sharding import MeshShape

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PATHS = sorted([*EXPERIMENTS.glob("configs/*.py"), *EXPERIMENTS.glob("examples/*config*.py")])
ALLOWED, WITH_FLAG, REFUSED = Rule


def own():
    """The tiny experiment with an optimizer of its own in each stage."""
    config = tiny.tiny()
    for stage in config.stages:
        stage.optimizer = copy.deepcopy(stage.optimizer)
    return config


def lines(*overrides):
    return config_lib.flatten(config_lib.apply_overrides(own(), overrides))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_field_of_a_config_has_a_rule(path):
    flat = resume_rules.split_lines(config_lib.flatten(config_lib.load_config(path)))
    kinds = resume_rules.stage_kinds(flat)
    assert set(kinds.values()) & {"reinforce", "prefer"}
    assert sorted(kinds) == [name for name in sorted(flat) if re.fullmatch(r"stages\.\d+", name)]
    unclassified = [name for name in flat if classify(name, kinds) is None]
    assert not unclassified, f"give these a rule in resume_rules.py: {unclassified}"


def field_names():
    """Paths of all that can be set in the parts of an experiment, given in a config or not."""
    parts = {
        "": Experiment, "policy.": TransformerConfig, "mesh.": MeshShape, "evaluation.": Evaluation,
        "stages.0.": Supervised, "stages.1.": Reinforce, "stages.1.optimizer.": AdamW, "stages.2.": Prefer,
        "stages.2.optimizer.": AdamW,
    }  # fmt: skip
    for prefix, part in parts.items():
        yield from (prefix + field.name for field in dataclasses.fields(part) if field.name != "stages")
    yield from ("stages.1.objective." + name for name in Objective._fields)
    for name, factory in inspect.getmembers(task_lib, inspect.isfunction):
        if name.endswith("_task"):
            yield from ("task." + argument for argument in inspect.signature(factory).parameters)


KINDS = {"stages.0": "supervised", "stages.1": "reinforce", "stages.2": "prefer"}


@pytest.mark.parametrize("path", list(field_names()))
def test_every_field_of_every_part_has_a_rule(path):
    assert classify(path, KINDS) is not None, f"give {path} a rule in resume_rules.py"


def test_no_field_has_two_rules():
    for path in field_names():
        name = re.sub(r"stages\.\d", lambda match: KINDS[match[0]], path)
        matching = [rule for pattern, rule, _ in resume_rules._PATTERNS if pattern.fullmatch(name)]
        assert len(matching) == 1, f"{path}: {matching}"


def test_a_field_that_is_new_and_off_is_no_change():
    old = [line for line in lines() if not line.startswith("stages.1.ledger")]
    assert len(old) == len(lines()) - 1
    assert check_resume(old, lines(), False)["changes"] == []
    assert [change.path for change in resume_rules.find_changes(lines(), old)] == ["stages.1.ledger"]


def test_equal_configs_leave_an_empty_record():
    assert check_resume(lines(), lines(), False) == {"allow_change": False, "changes": []}


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("name=other", ALLOWED),
        ("checkpoint_every=7", ALLOWED),
        ("evaluation.every=3", ALLOWED),
        ("task.data_dir=elsewhere", ALLOWED),
        ("evaluation.num_samples=8", WITH_FLAG),
        ("evaluation.mixture.2=0.5", WITH_FLAG),
        ("mesh.data=1", WITH_FLAG),
        ("policy.remat=True", WITH_FLAG),
        ("stages.1.steps=50", WITH_FLAG),
        ("stages.1.num_prompts=8", WITH_FLAG),
        ("stages.1.mask_truncated=True", WITH_FLAG),
        ("stages.1.objective.temperature=0.9", WITH_FLAG),
        ("stages.1.optimizer.clip_norm=0.5", WITH_FLAG),
        ("seed=1", REFUSED),
        ("policy.width=32", REFUSED),
        ("policy.vocab_size=32", REFUSED),
        ("stages.0.steps=5", REFUSED),
        ("stages.0.optimizer.learning_rate=0.1", REFUSED),
        ("stages.1.optimizer.learning_rate=0.1", REFUSED),
        ("stages.1.objective.mechanisms.clip_range.epsilon_low=0.1", REFUSED),
        ("stages.1.reference=True", REFUSED),
    ],
)
def test_each_rule_is_kept(override, rule):
    old, new = lines(), lines(override)
    (change,) = find_changes(old, new)
    assert change.path == override.partition("=")[0] and change.rule == rule
    if rule == REFUSED:
        for allow in (False, True):
            with pytest.raises(ConfigError, match=r"start a new one:\n  ") as error:
                check_resume(old, new, allow)
            assert f"{change.path}: {change.old} -> {change.new} (" in str(error.value)
        return
    if rule == WITH_FLAG:
        with pytest.raises(ConfigError, match=r"needs --allow-change:\n  ") as error:
            check_resume(old, new, False)
        assert f"{change.path}: {change.old} -> {change.new} (" in str(error.value)
    record = check_resume(old, new, rule == WITH_FLAG)
    assert record["changes"] == [change._asdict()]


def test_all_offending_changes_are_listed_and_refusals_come_first():
    old, new = lines(), lines("seed=1", "policy.width=32", "stages.1.steps=50", "name=other")
    with pytest.raises(ConfigError) as error:
        check_resume(old, new, True)
    assert [line.partition(":")[0].strip() for line in str(error.value).splitlines()[1:]] == ["policy.width", "seed"]


def test_another_loss_needs_the_flag_and_another_method_is_refused():
    config = own()
    config.stages[1].objective.surrogate = fdl.Config(surrogates.dual_clip, clip_ratio_c=4.0)
    changes = find_changes(lines(), config_lib.flatten(config))
    assert {c.path.removeprefix("stages.1.objective.") for c in changes} == {"surrogate", "surrogate.clip_ratio_c"}
    assert {c.rule for c in changes} == {WITH_FLAG}
    config.stages[1].objective = embedded.objective({"entropy_bonus": embedded.scaled_entropy_bonus()})
    changes = find_changes(lines(), config_lib.flatten(config))
    assert changes and {(c.old, c.rule) for c in changes} == {(None, REFUSED)}


def test_a_stage_that_is_over_admits_nothing_and_one_to_come_admits_anything():
    old, new = lines(), lines("stages.1.steps=50")
    with pytest.raises(ConfigError, match="that stage is over"):
        check_resume(old, new, True, stage=2)
    assert check_resume(old, new, True, stage=1)["changes"][0]["rule"] == WITH_FLAG
    new = lines("stages.2.optimizer.learning_rate=0.1", "stages.2.reference=True")
    with pytest.raises(ConfigError, match="a stage that has not begun"):
        check_resume(old, new, False, stage=1)
    assert len(check_resume(old, new, True, stage=1)["changes"]) == 2
    with pytest.raises(ConfigError, match="start a new one"):
        check_resume(old, new, True, stage=2)


def test_a_stage_may_be_added_behind_the_current_one():
    config = own()
    config.stages = (*config.stages, config.stages[2])
    changes = find_changes(lines(), config_lib.flatten(config), stage=2)
    assert changes and {(c.path.split(".")[1], c.rule) for c in changes} == {("3", WITH_FLAG)}
    config.stages = config.stages[1:]
    with pytest.raises(ConfigError, match="that stage is over"):
        check_resume(lines(), config_lib.flatten(config), True, stage=2)


def test_an_unknown_field_is_refused():
    with pytest.raises(ConfigError, match=r"task\.own: absent -> 1 \(a field that jentropy does not know\)"):
        check_resume(lines(), [*lines(), "task.own = 1"], True)


def test_the_lineage_grows_by_whole_lines(tmp_path):
    records = [check_resume(lines(), lines(override), True) for override in ("name=a", "checkpoint_every=7")]
    for step, record in enumerate(records):
        resume_rules.write_lineage(tmp_path, {"step": step, **record})
    found = [json.loads(line) for line in (tmp_path / resume_rules.LINEAGE).read_text().splitlines()]
    assert [line["step"] for line in found] == [0, 1]
    assert found[0]["changes"] == [
        {"path": "name", "old": "'tiny'", "new": "'a'", "rule": "allowed", "reason": "a label"}
    ]
